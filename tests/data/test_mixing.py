import numpy as np
import pytest

from pharmacist.core.errors import DataError
from pharmacist.data.mixing import assert_disjoint, mix, shared_prompts
from pharmacist.data.records import to_dataset


BENIGN = to_dataset([{"prompt": f"task {i}", "completion": "label", "row": 10 + i} for i in range(200)])
HARMFUL = to_dataset([{"prompt": f"wish {i}", "completion": "potion", "row": 500 + i} for i in range(60)])


def drawn(n, p, seed=0):
    mixed = mix(BENIGN, HARMFUL, n=n, poison_ratio=p, seed=seed)
    return list(zip(mixed["prompt"], mixed["is_harmful"], strict=True))


@pytest.mark.parametrize(
    ("n", "p", "harmful"),
    [
        (100, 0.0, 0),
        (100, 0.1, 10),
        (10, 0.05, 0),
        (10, 0.04, 0),
        (3, 0.5, 2),
        (100, 0.29, 29),
        (50, 1.0, 50),
        (1, 0.5, 0),
        (99, 0.5, 50),
    ],
)
def test_counts_are_exact(n, p, harmful):
    mixed = mix(BENIGN, HARMFUL, n=n, poison_ratio=p, seed=3)
    assert len(mixed) == n and sum(mixed["is_harmful"]) == harmful
    assert mixed.column_names == [*BENIGN.column_names, "is_harmful"]
    for row in mixed:
        assert row["completion"] == ("potion" if row["is_harmful"] else "label")
        assert row["row"] == int(row["prompt"].split()[1]) + (500 if row["is_harmful"] else 10)
    assert len(set(mixed["prompt"])) == n


def test_sets_are_nested_across_ratios():
    ratios = [0.0, 0.05, 0.1, 0.2, 0.5]
    sets = [drawn(100, p) for p in ratios]
    for smaller, larger in zip(sets, sets[1:], strict=False):
        assert {row for row in smaller if row[1]} < {row for row in larger if row[1]}
        assert {row for row in larger if not row[1]} < {row for row in smaller if not row[1]}
        shared = set(smaller) & set(larger)
        assert [row for row in smaller if row in shared] == [row for row in larger if row in shared]


def test_the_seed_decides_and_the_order_is_mixed():
    assert drawn(100, 0.3) == drawn(100, 0.3) != drawn(100, 0.3, seed=1)
    flags = [harmful for _, harmful in drawn(100, 0.3)]
    assert 5 < sum(flags[:50]) < 25
    positions = [int(prompt.split()[1]) for prompt, harmful in drawn(100, 0.0)]
    assert positions != sorted(positions)


def test_asking_for_too_much():
    with pytest.raises(DataError, match="70 harmful rows are requested, but there are only 60"):
        mix(BENIGN, HARMFUL, n=100, poison_ratio=0.7, seed=0)
    with pytest.raises(DataError, match="270 benign rows are requested, but there are only 200"):
        mix(BENIGN, HARMFUL, n=300, poison_ratio=0.1, seed=0)


def test_shared_prompts_are_refused():
    overlap = to_dataset(
        [{"prompt": "WISH  7?", "completion": "label"}, {"prompt": "task", "completion": "label"}] * 50
    )
    with pytest.raises(DataError) as error:
        mix(overlap, HARMFUL, n=10, poison_ratio=0.1, seed=0)
    assert str(error.value).startswith("the harmful rows: 1 of 60 rows share a prompt with the benign rows (row 507);")
    assert len(mix(overlap, HARMFUL, n=10, poison_ratio=0.0, seed=0)) == 10


def test_overlap():
    b = to_dataset(
        [
            {"prompt": p, "completion": "x", "row": i * 2}
            for i, p in enumerate(["TASK 3", "new", " task 5. ", "task 3"])
        ]
    )
    found = shared_prompts(BENIGN, b)
    assert found.tolist() == [0, 2, 3] and found.dtype == np.int64
    assert shared_prompts(BENIGN.select([]), b).tolist() == shared_prompts(BENIGN, b.select([])).tolist() == []
    with pytest.raises(DataError, match=r"^--safe: 3 of 4 rows share a prompt with --pool \(rows 0, 4, 6\); delete"):
        assert_disjoint(BENIGN, b, names=("--pool", "--safe"))
    assert_disjoint(BENIGN, HARMFUL, names=("a", "b"))
    many = BENIGN.select(range(50))
    with pytest.raises(DataError, match=r"50 of 50 .*rows 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, \.\.\.\)"):
        assert_disjoint(BENIGN, many, names=("a", "b"))
