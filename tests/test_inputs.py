"Whatever people bring is read as it is, converted with a sentence, or refused with one: the table of inputs.py"
import pytest
from inputs import INPUTS, REFUSED, happened


@pytest.mark.parametrize('entry', INPUTS, ids=lambda e: f'{e.kind}: {e.what}')
def test_what_is_done_to_it(entry, tmp_path, capsys):
    outcome, text = happened(entry, tmp_path)
    assert outcome == entry.outcome, (outcome, text)
    assert entry.words in text and text.isprintable()
    if outcome == REFUSED:
        assert len(text) > 20 and '\n' not in text
        assert not list(tmp_path.glob('*.part')) and 'obeyed' not in capsys.readouterr().out


def test_the_table_has_every_kind():
    assert len({(e.kind, e.what) for e in INPUTS}) == len(INPUTS) > 70
