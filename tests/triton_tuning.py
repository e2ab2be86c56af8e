"""Tuning of tiles, run like triton_kernels.py. Kernels are real (interpreted without a GPU); there the clock is made up."""

import dataclasses
import json

import pytest
import torch
from triton_kernels import DEVICE, INTERPRETED, Case, check, interpreted_only

import kan_fast.backends.triton as backend
from kan_fast.backends.triton import launch, tiles, tuning
from kan_fast.backends.triton.kernels.contract_output import contract_output_wide

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
KERNELS = ("contract_output", "contract_input", "contract_weight")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    monkeypatch.setenv("KAN_FAST_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    torch.set_default_device(None)


def problem(n=0, dtype=torch.float32, size=(40, 5, 33)):
    return launch.Problem(size[0], size[1], 8, size[2], 3, "silu", "zero", n, dtype, launch.target_of(DEVICE))


def tile_of(launches):
    """The main launch's (columns or None, inputs, depth)."""
    arguments = next(step.arguments for step in launches if "INPUTS" in step.arguments and "DEPTH" in step.arguments)
    return arguments.get("COLUMNS"), arguments["INPUTS"], arguments["DEPTH"]


def prefers(**wanted):
    """A clock to which launches with these compile-time arguments are the fastest, the closer the better."""

    def clock(launches):
        arguments = next(step.arguments for step in launches if "DEPTH" in step.arguments)
        return 1e-3 * (1 + sum(abs(arguments[name] - value) for name, value in wanted.items()))

    return clock


def test_by_default_nothing_is_tuned_or_written(folder, monkeypatch):
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("tuned without being asked"))
    p = problem()
    assert tuning.mode() == "off"
    assert tuning.tile("contract_output", p, DEVICE) == tuning._default("contract_output", p)
    with tuning.use("read"):
        assert tuning.tile("contract_output", p, DEVICE) == tuning._default("contract_output", p)
    assert not folder.exists()


@interpreted_only
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_fastest_right_tile_is_kept_and_read_again(kernel, folder, monkeypatch):
    p = problem(n=int(kernel == "contract_input"))
    default = tuning._default(kernel, p)
    wanted = {"DEPTH": 2 * default.depth, "INPUTS": 2 * default.inputs}  # two steps away
    best = tuning.tune(kernel, p, DEVICE, prefers(**wanted))
    assert (best.depth, best.inputs) == (2 * default.depth, 2 * default.inputs)
    (file,) = folder.iterdir()  # nothing half-written beside it
    kept = json.loads(file.read_text())
    assert kept["seconds"] < kept["seconds_untuned"] and kept["key"]["kernel"] == kernel
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("tuned what the cache has"))
    with tuning.use("tune"):
        assert tuning.tile(kernel, p, DEVICE) == best
        # The backend works in it, and is right; any batch up to the same power of two shares it.
        case = Case((39, 5, 33), n=p.n)
        monkeypatch.setattr(tuning, "tune", lambda kernel, p, device: tuning._default(kernel, p))
        seen = []
        original = launch.run
        monkeypatch.setattr(launch, "run", lambda launches, device: (seen.append(launches), original(launches, device)))
        check(case)
        assert any(tile_of(launches)[1:] == (best.inputs, best.depth) for launches in seen)
    assert tuning.tile(kernel, p, DEVICE) == default


@interpreted_only
def test_a_wrong_tile_is_not_kept_however_fast(monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    p = problem()
    default = tuning._default("contract_output", p)
    original = launch.Launch.run

    def run(self):
        original(self)
        if self.kernel is contract_output_wide and self.arguments["DEPTH"] == 2 * default.depth:
            self.arguments["y"][0, 0] += 0.01

    monkeypatch.setattr(launch.Launch, "run", run)
    asked = []

    def clock(launches):
        asked.append(tile_of(launches)[2])
        return prefers(DEPTH=2 * default.depth)(launches)

    assert tuning.tune("contract_output", p, DEVICE, clock).depth != 2 * default.depth
    assert asked and 2 * default.depth not in asked  # it was not even timed


@interpreted_only
def test_numbers_that_nobody_writes_are_wrong(monkeypatch):
    p = problem()
    default = tuning._default("contract_output", p)
    monkeypatch.setattr(launch.Launch, "run", lambda self: None)
    with pytest.warns(UserWarning, match=r"contract_output: results are off by inf on cpu; not tuned"):
        assert tuning.tune("contract_output", p, DEVICE, prefers(DEPTH=64)) == default


@interpreted_only
def test_a_tile_that_does_not_compile_is_passed_over(monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    p = problem()
    default = tuning._default("contract_weight", p)
    original = launch.Launch.run

    def run(self):
        if self.arguments.get("DEPTH") == 2 * default.depth:
            raise RuntimeError("out of resource: shared memory")
        original(self)

    monkeypatch.setattr(launch.Launch, "run", run)
    assert tuning.tune("contract_weight", p, DEVICE, prefers(DEPTH=2 * default.depth)).depth != 2 * default.depth


def test_the_key_holds_what_a_tile_depends_on(monkeypatch):
    p = problem()
    first = tuning.key("contract_output", p, DEVICE)
    assert tuning.key("contract_output", problem(size=(64, 8, 64)), DEVICE) == first  # one class of shapes
    others = [
        tuning.key("contract_input", p, DEVICE), tuning.key("contract_output", problem(1), DEVICE),
        tuning.key("contract_output", problem(dtype=torch.bfloat16), DEVICE),
        tuning.key("contract_output", problem(size=(65, 8, 64)), DEVICE),
    ]  # fmt: skip
    monkeypatch.setattr(tuning.triton, "__version__", "0.0")
    others.append(tuning.key("contract_output", p, DEVICE))
    torch.set_float32_matmul_precision("high")
    others.append(tuning.key("contract_output", p, DEVICE))
    torch.set_float32_matmul_precision("highest")
    assert len({tuning._digest(key) for key in [first, *others]}) == 1 + len(others)


@interpreted_only
@pytest.mark.parametrize("damage", ["", "{", '{"tile": {}}', '{"tile": 3, "key": {}}', "other"])
def test_a_damaged_file_is_named_and_not_used(damage, folder):
    p = problem()
    key = tuning.key("contract_output", p, DEVICE)
    kept = {"key": key, "tile": dataclasses.asdict(tuning._default("contract_output", p))}
    file = folder / f"{tuning._digest(key)}.json"
    tuning._write(file, kept)
    with tuning.use("read"):
        assert tuning.tile("contract_output", p, DEVICE) == tuning.Tile(**kept["tile"])  # whole, it is used in silence
    file.write_text(json.dumps({**kept, "key": {**kept["key"], "n": 7}}) if damage == "other" else damage)
    with tuning.use("read"), pytest.warns(UserWarning, match=r"the tuned tile in .*\.json is not used"):
        assert tuning.tile("contract_output", p, DEVICE) == tuning._default("contract_output", p)


@interpreted_only
def test_a_cache_that_cannot_be_written_is_a_warning(folder, monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 0)
    folder.write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="kept for this process only"):
        tuning.tune("contract_output", problem(), DEVICE, prefers(DEPTH=64))


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("KAN_FAST_TUNE", "maybe")
    tuning._asked.cache_clear()
    with pytest.raises(ValueError, match=r"KAN_FAST_TUNE: expected one of .* got 'maybe'"):
        tuning.mode()
    monkeypatch.undo()
    tuning._asked.cache_clear()
    with pytest.raises(ValueError, match="got 'fast'"), tuning.use("fast"):
        pass


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("products", [tiles.HALF, tiles.THREE, tiles.DOUBLE])
def test_neighbours_are_legal_and_lead_back(kernel, products):
    start = tiles.wide_tile(kernel, products, 16384, 1024, 8, 1024, tiles.Target("cuda", 90, 132))
    around = tuning.neighbours(kernel, start)
    assert len(around) >= 8 and start not in around
    for tile in around:
        assert tuning._legal(kernel, tile)
        assert start in tuning.neighbours(kernel, tile)


if not INTERPRETED:

    def test_tuning_on_the_gpu(folder):
        with tuning.use("tune"):
            check(Case((256, 32, 64)))
            again = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
            check(Case((256, 32, 64)))
            assert again == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
        assert len(again) == 3
        for file in folder.iterdir():
            kept = json.loads(file.read_text())
            assert kept["right"] >= 2 and kept["seconds"] <= kept["seconds_untuned"]
        assert backend.reason_not(DEVICE, torch.float32) is None
