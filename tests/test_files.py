"""KANs and their state in files: whole, or a clear error."""

import builtins
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import make_grid
from torch import nn

from kan_fast import KAN, KANLayer, SparseKANLayer, adaptive_grid_refinement, compact, prune_kan, sparsify
from kan_fast.nn.tensor_file import read_tensors, write_tensors

ROOT = str(Path(__file__).parents[1])


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours.layer_dims == theirs.layer_dims
    assert {k: (v.dtype, v.shape) for k, v in ours.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.state_dict().items()
    }
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert repr(mine) == repr(other) and mine.grid_range == other.grid_range
        assert all(p.requires_grad for p in mine.parameters())
    x = torch.rand(20, ours.layer_dims[0]).to(ours.layers[0].spline_weight.dtype) * 4 - 2
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("options", [{}, {"bias": True, "outside": "linear", "backend": "reference"}, {"base_activation": None},
                                     {"base_activation": "gelu", "grid_range": (0.1, 0.7)}, {"dtype": torch.float64},
                                     {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str)  # fmt: skip
def test_round_trip(tmp_path, options):
    model = KAN([3, 5, 2], 6, 2, **options)
    model.save(tmp_path / "model.kan")
    assert_same(KAN.load(tmp_path / "model.kan"), model)
    assert os.listdir(tmp_path) == ["model.kan"]


@pytest.mark.parametrize("options", [{"bias": True, "outside": "linear"}, {"base_activation": None, "dtype": torch.float64},
                                     {"base_activation": torch.sin, "dtype": torch.bfloat16}], ids=str)  # fmt: skip
def test_round_trip_of_sparse_layers(tmp_path, options):
    model = KAN([6, 8, 3], **options)
    model.layers[0].edge_mask = torch.rand(6, 8) < 0.3
    model.layers[0].edge_mask[2] = False
    assert sparsify(model, 0.5) == ["layers.0"]
    model.layers[0].grid += torch.rand(6, 1).to(model.layers[0].grid.dtype)
    model.save(tmp_path / "model")
    function = options.get("base_activation") if callable(options.get("base_activation")) else None
    back = KAN.load(tmp_path / "model", base_activation=function, backend="reference")
    assert isinstance(back.layers[0], SparseKANLayer) and back.layers[1].backend == "reference"
    assert repr(back.layers[0]) == repr(model.layers[0])
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    x = torch.rand(20, 6).to(back.layers[1].spline_weight.dtype) * 4 - 2
    assert torch.equal(back.layers[0](x), model.layers[0](x))
    back(x).sum().backward()
    with pytest.raises(TypeError, match="got SparseKANLayer as layer 0: see its to_dense"):
        compact(model)
    state, metadata = read_tensors(tmp_path / "model")
    state["layers.0.edges"][0, 0] = 6
    write_tensors(tmp_path / "model", state, metadata)
    with pytest.raises(ValueError, match=r"damaged: .* layer 0 do not fit: edges: expected inputs from 0 to 5"):
        KAN.load(tmp_path / "model", base_activation=function)


def test_wide_sparse_layers_are_saved_by_their_edges(tmp_path):
    model = KAN.from_layers([SparseKANLayer(100_000, 4, 3, grid_size=2, spline_order=1), KANLayer(4, 1)])
    model.save(tmp_path / "wide")
    # 100,000 inputs with 5 knots in float32, and little else.
    assert os.path.getsize(tmp_path / "wide") < 2.1e6
    x = torch.rand(2, 100_000)
    assert torch.equal(KAN.load(tmp_path / "wide")(x), model(x))


def test_round_trip_of_pruned_refined_compacted(tmp_path):
    model = KAN([4, 6, 3], bias=True)
    model.layers[0].set_grid(make_grid("uneven", 4, 5, 3))
    x = torch.rand(200, 4) * 2 - 1
    prune_kan(model, 0.3, data=x, relative=True)
    assert not model.layers[0].edge_mask.all()
    model.save(str(tmp_path / "masked"))
    assert_same(KAN.load(str(tmp_path / "masked")), model)
    with torch.no_grad():
        model.layers[0].base_weight[2] = 0
        model.layers[0].spline_weight[2] = 0
    adaptive_grid_refinement(model, x)
    small = compact(model, drop_inputs=True)
    small.save(tmp_path / "compact")
    back = KAN.load(tmp_path / "compact")
    assert_same(back, small)
    assert 2 not in back.input_index.tolist()
    torch.testing.assert_close(back(x[:, back.input_index]), model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_of_each_kind(tmp_path):
    model = KAN.from_layers([KANLayer(2, 3, 4, 1), KANLayer(3, 3, 9, 3, outside="clamp", bias=True), KANLayer(3, 1)])
    model.save(tmp_path / "m")
    assert_same(KAN.load(tmp_path / "m"), model)
    with pytest.raises(ValueError, match="layer 1 to have 3 inputs, got 2"):
        KAN.from_layers([KANLayer(2, 3), KANLayer(2, 3)])


def test_base_activations_that_are_functions(tmp_path):
    model = KAN([2, 3, 1], base_activation=nn.SiLU())
    model.save(tmp_path / "m")
    assert KAN.load(tmp_path / "m").layers[0].base_activation == "silu"
    model = KAN([2, 3, 1], base_activation=torch.sin)
    model.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: saved with the base activation <built-in .*sin.* pass base_activation"):
        KAN.load(tmp_path / "m")
    assert_same(KAN.load(tmp_path / "m", base_activation=torch.sin), model)
    model = KAN([2, 3, 1], base_activation=nn.PReLU())
    model.layers[0].base_activation.weight.data.fill_(0.7)
    model.save(tmp_path / "m")
    assert_same(KAN.load(tmp_path / "m", base_activation=nn.PReLU()), model)


def test_only_what_can_be_loaded_is_saved(tmp_path):
    model = KAN([2, 3, 1])
    model.extra = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"layers alone, got also extra.weight"):
        model.save(tmp_path / "m")
    model = KAN([2, 3, 1])
    model.layers[1] = nn.Linear(3, 1)
    with pytest.raises(TypeError, match="expected KANLayers and SparseKANLayers, got Linear at 1"):
        model.save(tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = KAN([2, 3, 1])
    model.save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        KAN([2, 3, 1]).save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_names_the_path_given(tmp_path):
    model = KAN([2, 3, 1])
    (tmp_path / "file").write_bytes(b"")
    for path, error in (
        (tmp_path / "nowhere" / "m", FileNotFoundError),
        (tmp_path / "file" / "m", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(error) as caught:
            model.save(path)
        assert caught.value.filename == str(path)
        assert str(caught.value).endswith(f": {str(path)!r}")
    for path in ("", "/"):
        with pytest.raises(ValueError, match=f"^path: expected that of a file, got '{path}'"):
            model.save(path)
    assert os.listdir(tmp_path) == ["file"]


def test_every_truncation_is_noticed(tmp_path):
    KAN([1, 1], 1, 1).save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "m").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="m: (truncated|expected a safetensors file)"):
            KAN.load(tmp_path / "m")
    (tmp_path / "m").write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="damaged: expected"):
        KAN.load(tmp_path / "m")


class Bomb:
    def __reduce__(self):
        return (sys.exit, (3,))


def test_foreign_files(tmp_path):
    path = tmp_path / "m"
    torch.save(KAN([2, 1]).state_dict(), path)
    with pytest.raises(ValueError, match="m: expected a safetensors file, got something else"):
        KAN.load(path)
    for foreign in (pickle.dumps(Bomb()), b"hello", b"", b'{"json": true}', os.urandom(1000)):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="m: expected a safetensors file"):
            KAN.load(path)
    write_tensors(path, {"weight": torch.zeros(3)}, {"format": "pt"})
    with pytest.raises(ValueError, match="m: expected a file by KAN.save, got a safetensors file of another program"):
        KAN.load(path)
    with pytest.raises(FileNotFoundError):
        KAN.load(tmp_path / "absent")


def rewritten(path, change_config=None, change_tensors=None):
    """The file with parts of its configuration or tensors changed."""
    tensors, metadata = read_tensors(path)
    config = json.loads(metadata["kan_fast.KAN"])
    if change_config is not None:
        change_config(config)
    if change_tensors is not None:
        change_tensors(tensors)
    write_tensors(path, tensors, {**metadata, "kan_fast.KAN": json.dumps(config)})


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (lambda c: c.update(version=3), None, "written in version 3 .* newer kan_fast; this one reads up to version 2"),
        (lambda c: (c.update(version=9), c.pop("layers")), None, "written in version 9"),
        (lambda c: c.update(version=0), None, "not one that KAN.save writes"),
        (lambda c: c.update(layers=[]), None, "not one that KAN.save writes"),
        (lambda c: c.update(layers={"a": 1}), None, "not one that KAN.save writes"),
        (lambda c: c["layers"][1].update(out_features=10**15), None, "layer 1 do not fit"),
        (lambda c: c["layers"][1].update(in_features=10**20), None, "layer 1 do not fit"),
        (lambda c: c["layers"][1].update(outside="beyond"), None, "layer 1 do not fit: outside: expected"),
        (lambda c: c["layers"][1].update(surprise=1), None, "layer 1 do not fit: .*surprise"),
        (lambda c: c["layers"].pop(), None, "no layer has the weights layers.1"),
        (None, lambda t: t.pop("layers.1.grid"), "layer 1 do not fit: .*Missing key.*grid"),
        (None, lambda t: t.update({"layers.0.base_weight": torch.zeros(1)}), "layer 0 do not fit: .*base_weight"),
        (None, lambda t: t.update({"layers.0.surprise": torch.zeros(1)}), "layer 0 do not fit: .*Unexpected key.*surprise"),
    ],
)
def test_changed_files(tmp_path, config, tensors, message):
    KAN([2, 3, 1]).save(tmp_path / "m")
    rewritten(tmp_path / "m", config, tensors)
    with pytest.raises(ValueError, match=f"(?s)m: .*{message}"):
        KAN.load(tmp_path / "m")


def header_bytes(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "the entry of 'a'"),
        ({"a": [1, 2]}, "the entry of 'a'"),
        ({"a": {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 4]}}, "the entry of 'a'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not go with its 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "does not go with"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "does not go with"),
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, "overlap or leave gaps"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "overlap or leave gaps"),
        ({"__metadata__": {"a": 1}}, "metadata are not strings"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    (tmp_path / "m").write_bytes(header_bytes(header) + bytes(4))
    with pytest.raises(ValueError, match=f"m: damaged: .*{message}"):
        KAN.load(tmp_path / "m")
    (tmp_path / "m").write_bytes((40).to_bytes(8, "little") + b'{"a": ' + b"[" * 40)
    with pytest.raises(ValueError, match="header is not JSON"):
        KAN.load(tmp_path / "m")


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    model = KAN([2, 3, 1])
    model.save(tmp_path / "m")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled or executed")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (builtins, "eval"), (builtins, "exec")):
        monkeypatch.setattr(module, name, refuse)
    model = KAN.load(tmp_path / "m")
    assert model.layer_dims == [2, 3, 1]


def test_state_dict_through_torch_save(tmp_path):
    """With weights_only, that is without pickle's powers; a mask comes with the state."""
    model = KAN([3, 4, 2], bias=True)
    model.layers[1].edge_mask = torch.rand(4, 2) > 0.5
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = KAN([3, 4, 2], bias=True)
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert_same(other, model)


def test_state_dict_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = KAN([3, 4, 2], bias=True, dtype=torch.bfloat16)
    model.layers[1].edge_mask = torch.rand(4, 2) > 0.5
    safetensors.save_file(model.state_dict(), tmp_path / "m")
    other = KAN([3, 4, 2], bias=True, dtype=torch.bfloat16)
    other.load_state_dict(safetensors.load_file(tmp_path / "m"))
    assert_same(other, model)
    # Our files are theirs, and theirs are ours.
    model.save(tmp_path / "m")
    other.load_state_dict(safetensors.load_file(tmp_path / "m"))
    assert_same(other, model)
    tensors = {"a": torch.rand(3, 0, 2), "b": torch.tensor(3), "c": torch.rand(3).half(), "d": torch.rand(2, 3).double()}
    safetensors.save_file(tensors, tmp_path / "m", {"format": "pt"})
    back, metadata = read_tensors(tmp_path / "m")
    assert metadata == {"format": "pt"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


class Sharded(torch.Tensor):
    pass


def test_large_and_strided_tensors(tmp_path):
    tensors = {"a": torch.rand(300, 1000).t(), "b": torch.arange(7)[::2], "c": torch.zeros(0), "d": torch.tensor(True)}
    write_tensors(tmp_path / "m", tensors, {})
    back, _ = read_tensors(tmp_path / "m")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    with pytest.raises(TypeError, match="z: expected one of .*complex64"):
        write_tensors(tmp_path / "m", {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(TypeError, match="z: expected a plain tensor, got Sharded"):
        write_tensors(tmp_path / "m", {"z": torch.zeros(2).as_subclass(Sharded)}, {})


def test_interruption_during_a_save(tmp_path):
    """Killed while it writes: the file at its place is the old one."""
    KAN([2, 3, 1]).save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    code = "import os; from kan_fast import KAN; os.fsync = lambda fd: os.kill(os.getpid(), 9); KAN([9, 9]).save('m')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == -9
    assert (tmp_path / "m").read_bytes() == before
