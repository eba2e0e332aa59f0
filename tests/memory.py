"What a training step may change"
import torch

from ltbook.methods.difficulty_net import DifficultyWeigher


def memory(stage, optimizer):
    "All tensors a step may change"
    found = [*stage.network.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
    if stage.average: found += [stage.average.count, *stage.average.values.values()]
    weigher = stage.state.get('weigher')
    if isinstance(weigher, DifficultyWeigher):
        found += [
            *weigher.g.state_dict().values(),
            *weigher.sums.values(),
            *(v for s in weigher.optimizer.state.values() for v in s.values())]
    return [t for t in found if isinstance(t, torch.Tensor)]
