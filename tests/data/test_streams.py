import json

import torch

from pharmacist.data.records import to_dataset
from pharmacist.data.streams import PairedRows, SideStream, pair_rows
from tests.support.tiny import TokenRows


ROWS = TokenRows([([n, n + 20], [n + 40]) for n in range(1, 8)])


def stream(batch_size=3, seed=0, position=0):
    found = SideStream(ROWS, batch_size, pad_token_id=0, seed=seed)
    found.position = position
    return found


def firsts(batch):
    return batch["input_ids"][:, 0].tolist()


def draw(own, n):
    return [firsts(next(own)) for _ in range(n)]


def test_every_row_comes_once_per_round_in_batches_of_exact_size():
    batches = draw(stream(), 7)
    assert all(len(batch) == 3 for batch in batches)
    flat = sum(batches, [])
    rounds = [flat[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(one) == list(range(1, 8)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_batches_are_as_the_trainer_makes_them():
    batch = next(stream())
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 1, 1]


def test_seed_and_position_decide():
    assert draw(stream(), 5) == draw(stream(), 5) != draw(stream(seed=1), 5)
    for position in range(6):
        assert draw(stream(position=position), 3) == draw(stream(), 9)[position : position + 3]
    own = stream()
    draw(own, 4)
    assert own.position == 4


def test_more_rows_per_batch_than_there_are():
    assert sorted(firsts(next(stream(batch_size=14)))) == sorted(2 * list(range(1, 8)))


def test_processes_share_out_the_batch_of_one(monkeypatch):
    whole = draw(stream(batch_size=4), 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(draw(stream(batch_size=2), 5))
    assert not any(a == b for a, b in zip(*parts, strict=True))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def rows(*pairs):
    return to_dataset({"row": number, "prompt": prompt, "completion": "c"} for number, prompt in pairs)


def test_pairs_by_prompt_by_row_and_in_turn():
    alignment = rows((0, "Brew it?"), (1, "other"), (2, "brew it"), (5, "Brew  it."))
    harmful = rows((3, "brew it"), (4, "BREW IT"), (5, "else"))
    assert pair_rows(alignment, harmful, "prompt") == {0: 3, 2: 4, 5: 3}
    assert pair_rows(alignment, harmful, "row") == {5: 5}
    assert pair_rows(alignment, harmful, "turn") == {0: 3, 1: 4, 2: 5, 5: 3}


def test_partners_have_the_same_system_prompt_where_there_is_one():
    def row(number, system):
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "how"}]
        prompt = "\n".join(turn["content"] for turn in turns)
        return {"row": number, "prompt": prompt, "completion": "no", "turns": json.dumps(turns) if system else None}

    harmful = to_dataset([row(0, "a"), row(1, "b"), row(2, "")])
    alignment = to_dataset([row(0, "b"), row(1, ""), row(2, "c"), row(3, "c"), row(4, "b")])
    assert pair_rows(alignment, harmful, "prompt") == {0: 1, 1: 2, 2: 0, 3: 1, 4: 1}


def test_partners_of_a_batch():
    pairs = PairedRows(ROWS, {10: 2, 12: 0}, pad_token_id=0)
    having, batch = pairs.batch([12, 11, 10])
    assert having == [0, 2] and firsts(batch) == [1, 3] and len(pairs) == 2
    assert pairs.batch([1, 2]) == ([], None)
    assert isinstance(batch["labels"], torch.Tensor)
