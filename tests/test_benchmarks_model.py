"""Floors of a layer's time on a GPU: what the command takes, and the cards that it knows."""

import pytest

from benchmarks import model
from benchmarks.cases import Shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["X100"], "CARD: expected one of H100, H200, A100, MI300X, got 'X100'"),
        (["H200", "64,64"], "shape: expected batch,in,out"),
    ],
)
def test_floors_of_an_unknown_card(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        model.main(arguments)
    assert message in capsys.readouterr().err


def test_floors_say_how_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        model.main(["--help"])
    assert "one of H100, H200, A100, MI300X" in capsys.readouterr().out
    model.main(["64,64,64"])
    assert "floors on H100" in capsys.readouterr().out
    model.main(["H200"])
    assert "floors on H200" in capsys.readouterr().out


def test_an_h200_is_an_h100_with_faster_memory() -> None:
    old, new = model.CARDS["H100"], model.CARDS["H200"]
    assert old.products == new.products and old.lanes == new.lanes
    narrow, wide = Shape(1000000, 2, 5), Shape(16384, 1024, 1024)
    least = [model.floor(narrow, "contract_output", "bfloat16", card) for card in (old, new)]
    assert least[0].memory / least[1].memory == pytest.approx(4.8 / 3.35)
    bound = [model.floor(wide, "contract_output", "bfloat16", card).seconds for card in (old, new)]
    assert bound[0] == bound[1]  # by products, which are the same
