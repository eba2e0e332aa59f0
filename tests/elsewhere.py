"A device that is not the processor, imitated on the processor: what would be mixed up or read from a GPU is noticed"
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device('cpu', 0)             # what `device='cpu'` never is
TENSOR = torch.Tensor
# may see both sides
FREE = {'to', 'copy_', 'load_state_dict', '_has_compatible_shallow_copy_type', 'is_', 'type_as'}


def there(t): return getattr(t, 'there', False)


def mark(out, value=True):
    for t in tree_leaves(out):
        if isinstance(t, TENSOR): t.there = value
    return out


class Elsewhere(TorchFunctionMode):
    """Tensors made on `DEVICE`, moved there, or computed from such are marked.

    As on a GPU, numpy can't have them, and others don't meet them, indices excepted.
    Not seen: operations inside of torch.func, single numbers from the processor,
    and what happens below Python (a mark is kept by tensors that are pickled)."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, leaves = getattr(func, '__name__', ''), tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, TENSOR)]
        far = any(map(there, tensors))
        if func == TENSOR.device.__get__: return DEVICE if far else torch.device('cpu')
        if far and name in ('numpy', '__array__', 'pin_memory'):
            raise TypeError(f"{name} of a tensor that is elsewhere")
        devices = [d for d in leaves if isinstance(d, torch.device)] or [
            torch.device(d) for d in leaves if isinstance(d, str) and d in ('cpu', 'cpu:0')]
        if func == TENSOR.data.__set__:
            args[0].there = there(args[1])
            return func(*args, **kwargs)
        if name == '__deepcopy__': return mark(func(*args, **kwargs), there(args[0]))
        near = [t for t in tensors if not there(t) and t.ndim]
        if far and near and not devices and name not in FREE and torch._C._functorch.peek_interpreter_stack() is None:
            indexed = (
                name in ('__getitem__', '__setitem__')
                and there(args[0])
                and (name == '__getitem__' or there(args[2]) or not getattr(args[2], 'ndim', 0)))
            if not indexed:
                raise RuntimeError(f'{name} of tensors on two devices, shapes {[tuple(t.shape) for t in tensors]}')
        out = func(*args, **kwargs)
        if name == 'cpu': return mark(out.clone() if any(out is t for t in tensors) else out, False)
        if name == 'copy_' or name.endswith('_') and args and out is args[0]: return out
        if devices:
            same = any(out is t for t in tensors)
            return mark(
                out.clone()
                if same and there(out) != (devices[-1] == DEVICE) and not isinstance(out, torch.nn.Parameter)
                else out,
                devices[-1] == DEVICE)
        return mark(out) if far else out
