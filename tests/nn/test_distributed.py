"""What the first of several processes does for all, without the others."""

import pickle
from typing import Any

import pytest

from pharmacist.core.errors import DataError
from pharmacist.nn import distributed
from pharmacist.nn.distributed import on_main


def fail(error: Exception) -> Any:
    raise error


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


@pytest.mark.parametrize("error", [None, DataError("gone"), Unpicklable("odd")], ids=["result", "ours", "foreign"])
def test_what_the_first_process_gets_all_get(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def broadcast(value: Any) -> Any:
        sent.append(pickle.dumps(value))
        return pickle.loads(sent[0])

    monkeypatch.setattr(distributed, "from_main", broadcast)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        job = (lambda: [7]) if rank == "0" else lambda: pytest.fail("done twice")
        if error is None:
            assert on_main(job) == [7]
            continue
        kind = type(error) if rank == "0" or isinstance(error, DataError) else RuntimeError
        with pytest.raises(kind, match="gone|odd"):
            on_main((lambda: fail(error)) if rank == "0" else job)
