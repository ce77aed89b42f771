import numpy as np
import pytest

from apollo_sft.data.batch.loader import pack
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample


def sample(ids: list[int], labels: list[int]) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32), RowRef("f", 0), (1,))


def test_documents_stand_side_by_side_and_positions_restart() -> None:
    batch = pack([sample([5, 6, 7], [-100, 7, -100]), sample([8, 9], [9, -100])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[-100, 7, -100, 9, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.document_starts.tolist() == [0, 3, 5]
    assert batch.num_targets == 2


@pytest.mark.parametrize(("multiple", "total"), [(1, 5), (2, 6), (4, 8), (5, 5)])
def test_padding_is_a_document_of_its_own_without_targets(multiple: int, total: int) -> None:
    batch = pack([sample([5, 6, 7], [-100, 7, -100]), sample([8, 9], [9, -100])], multiple)
    assert batch.input_ids.shape == (1, total)
    assert batch.num_targets == 2
    assert batch.document_starts.tolist() == ([0, 3, 5] if total == 5 else [0, 3, 5, total])
    assert (batch.labels[0, 5:] == IGNORE_INDEX).all()
    assert batch.position_ids[0, 5:].tolist() == list(range(total - 5))


def test_no_sample_still_gives_a_forward() -> None:
    batch = pack([], multiple=4)
    assert batch.input_ids.shape == (1, 4)
    assert batch.num_targets == 0
    assert batch.document_starts.tolist() == [0, 4]
