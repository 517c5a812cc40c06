"""The checkpoint file that C++ and Python share, seen from Python."""

import collections
import math
import os
import pathlib
import random
import threading
import zipfile

import pytest
import torch

from torch_ext import _C

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def assert_same(a, b):
    """Equal types, order of keys and, for tensors, bits, strides and dtype."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
        assert a.requires_grad == b.requires_grad
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (math.isnan(a) and math.isnan(b))


def cpp_to_python(value, path):
    _C.write_state_dict(value, path)
    return torch.load(path, weights_only=True)


def python_to_cpp(value, path):
    torch.save(value, path)
    return _C.read_state_dict(path)


def cpp_to_cpp(value, path):
    _C.write_state_dict(value, path)
    return _C.read_state_dict(path)


@pytest.fixture(params=[cpp_to_python, python_to_cpp, cpp_to_cpp])
def through(request, tmp_path):
    return lambda value: request.param(value, tmp_path / "state.pt")


def trained(optimizer_class, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = optimizer_class(model.parameters(), **options)
    train(model, optimizer)
    return model, optimizer


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, True, False, 0, -1, 255, 256, 65536, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)])
def test_scalars(through, value):
    assert_same(through(value), value)


@pytest.mark.parametrize("value", [0.0, 0.1, 5e-324, math.inf, -math.inf, math.nan, "", "é\0\n", "x" * 70000])
def test_floats_and_strings(through, value):
    assert_same(through(value), value)


@pytest.mark.parametrize("value", [{}, [], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[], ({},)], list(range(3000))])
def test_containers(through, value):
    assert_same(through(value), value)


def test_mixed_dict_keeps_int_keys_and_order(through):
    value = {2: "int", "2": "str", 1.5: None, 0: {"params": [0, 1], "betas": (0.9, 0.999), "lr": 1e-3}}
    assert_same(through(value), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(through, dtype):
    tensor = torch.arange(6).remainder(2).to(dtype).view(2, 3)
    value = [tensor, tensor.t(), tensor[1, 2], torch.empty(0, 3, dtype=dtype)]
    assert_same(through(value), value)


def test_layouts(through):
    base = torch.arange(120.0).view(2, 3, 4, 5)
    value = {
        "permuted": base.permute(3, 1, 0, 2),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "strided": base[..., 1:4:2],
        "expanded": torch.ones(1).expand(3, 4),
        "scalar": torch.tensor(7.0),
        "empty": base[1:1],
        "parameter": torch.ones(2, requires_grad=True),
    }
    assert_same(through(value), value)


def test_shared_storage_stays_shared(through):
    base = torch.arange(1000.0)
    value = [base[:600], base[400:], base.view(10, 100).t(), base]
    loaded = through(value)
    assert_same(loaded, value)
    loaded[3].fill_(-1)
    assert all(bool((tensor == -1).all()) for tensor in loaded)


def test_ordered_dict_and_size_come_back_plain(tmp_path):
    value = collections.OrderedDict(b=torch.Size([2, 3]), a=[collections.OrderedDict()])
    assert_same(python_to_cpp(value, tmp_path / "a.pt"), {"b": (2, 3), "a": [{}]})


def test_module_state_dict(tmp_path):
    model, _ = trained(torch.optim.SGD, lr=0.1)
    state = model.state_dict()
    assert_same(python_to_cpp(state, tmp_path / "a.pt"), dict(state))
    model.load_state_dict(cpp_to_python(state, tmp_path / "b.pt"))


def test_parameter(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    assert_same(python_to_cpp(parameter, tmp_path / "a.pt"), torch.ones(3, requires_grad=True))


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adagrad, {"lr": 0.01}),
        (torch.optim.LBFGS, {"max_iter": 3}),
    ],
)
def test_optimizer_resumes_through_cpp(optimizer_class, options, tmp_path):
    if optimizer_class is torch.optim.LBFGS:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.LBFGS([parameter], **options)

        def closure():
            optimizer.zero_grad()
            loss = (parameter**4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    else:
        _, optimizer = trained(optimizer_class, **options)
    state = optimizer.state_dict()
    loaded = python_to_cpp(state, tmp_path / "a.pt")
    assert_same(loaded, state)
    assert_same(cpp_to_python(loaded, tmp_path / "b.pt"), state)


def test_resumed_training_has_the_same_bits(tmp_path):
    model, optimizer = trained(torch.optim.AdamW, lr=0.01)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = cpp_to_python(python_to_cpp(optimizer.state_dict(), tmp_path / "a.pt"), tmp_path / "b.pt")
    train(model, optimizer)

    other, _ = trained(torch.optim.AdamW, lr=0.01)
    other.load_state_dict(weights)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.5)
    resumed.load_state_dict(saved)
    train(other, resumed)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_files_without_checksums_or_with_many_records(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        assert_same(python_to_cpp({"a": torch.ones(3)}, tmp_path / "a.pt"), {"a": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(before)
    many = [torch.tensor(float(i)) for i in range(66000)]  # beyond the 16-bit counter of a plain zip archive
    assert torch.equal(torch.stack(python_to_cpp(many, tmp_path / "b.pt")), torch.arange(66000.0))


def test_mapped_load(tmp_path):
    """Records are aligned, so torch.load may map the file instead of reading it."""
    _C.write_state_dict({"a": torch.arange(1000.0)}, tmp_path / "a.pt")
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True, mmap=True), {"a": torch.arange(1000.0)})


def test_is_a_plain_zip_archive(tmp_path):
    _C.write_state_dict({"a": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        names = [name.split("/", 1)[1] for name in archive.namelist()]
    assert names == ["data.pkl", "byteorder", "data/0", "version", ".data/serialization_id"]


def test_tensors_of_another_device_load_to_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    assert_same(python_to_cpp(torch.ones(2), tmp_path / "a.pt"), torch.ones(2))
    assert _C.read_state_dict(tmp_path / "a.pt", map_location=torch.device("meta")).is_meta
    assert _C.read_state_dict(tmp_path / "a.pt", map_location="meta").is_meta


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_location(tmp_path):
    value = {"a": torch.arange(6.0, device="cuda:0").view(2, 3).t()}
    assert_same(cpp_to_python(value, tmp_path / "a.pt"), value)
    assert_same(_C.read_state_dict(tmp_path / "a.pt"), {"a": value["a"].cpu()})
    assert_same(_C.read_state_dict(tmp_path / "a.pt", map_location="cuda:0"), value)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.pt", pathlib.Path("ü b.pt"), os.fspath(tmp_path / "c.pt")):
        _C.write_state_dict(1, path)
        assert _C.read_state_dict(path) == torch.load(path, weights_only=True) == 1
    assert sorted(os.listdir()) == ["a.pt", "c.pt", "ü b.pt"]


def test_threads(tmp_path):
    value = {"a": torch.arange(1000.0)}
    failures = []

    def work():
        try:
            for _ in range(5):
                _C.write_state_dict(value, tmp_path / "a.pt")
                assert_same(_C.read_state_dict(tmp_path / "a.pt"), value)
        except BaseException as error:  # a thread's exception would be lost
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- what cannot be written ------------------------------------------------------------------------------------------


class Thing:
    pass


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"state": {0: {"x": 1j}}}, TypeError, r"value\['state'\]\[0\]\['x'\] is of type complex"),
        ([0, (Thing(),)], TypeError, r"value\[1\]\[0\] is of type Thing; expected dict, list"),
        ({"a": {1, 2}}, TypeError, "of type set"),
        ({"a": {(1, 2): 0}}, TypeError, r"value\['a'\] is of type tuple; expected a str, int"),
        ({"a": torch.float32}, TypeError, "of type dtype"),
        ({"seed": 2**63}, OverflowError, r"value\['seed'\] is an int of more than 64 bits"),
        (torch.ones(2).to_sparse(), RuntimeError, "layout Sparse"),
        (torch.ones(2, device="meta"), RuntimeError, "device meta"),
        (torch.ones(2, dtype=torch.complex64).conj(), RuntimeError, "resolve_conj"),
    ],
)
def test_refused_values_leave_the_old_file(tmp_path, value, error, message):
    _C.write_state_dict("old", tmp_path / "a.pt")
    with pytest.raises(error, match=message):
        _C.write_state_dict(value, tmp_path / "a.pt")
    assert _C.read_state_dict(tmp_path / "a.pt") == "old"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_cyclic_value(tmp_path):
    cycle = []
    cycle.append(cycle)
    with pytest.raises(RecursionError):
        _C.write_state_dict(cycle, tmp_path / "a.pt")


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(RuntimeError, match=r"'.*no\.pt' cannot be opened: No such file or directory$"):
        _C.read_state_dict(tmp_path / "no.pt")


@pytest.mark.parametrize(
    "value",
    [Thing(), {"a": 1j}, {1, 2}, b"bytes", torch.float32, torch.device("cpu"), torch.ones(2).to_sparse()],
    ids=lambda value: type(value).__name__,
)
def test_python_objects_are_refused(tmp_path, value):
    torch.save({"value": value}, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=r"'.*a\.pt' holds (a Python object that needs|the Python object) "):
        _C.read_state_dict(tmp_path / "a.pt")


def test_no_code_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (os.fspath(tmp_path / "owned"),))

    torch.save(Evil(), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=r"needs posix\.mkdir"):
        _C.read_state_dict(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_other_kinds_of_saved_file(tmp_path):
    torch.save([1], tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save([1], tmp_path / "protocol.pt", pickle_protocol=4)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    torch.save([2**64], tmp_path / "big.pt")
    for name, message in {
        "legacy.pt": "old format; save it again",
        "protocol.pt": "pickle protocol 4; save it again",
        "script.pt": "is not a torch.save file: it is a TorchScript archive",
        "big.pt": "an integer of more than 64 bits",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            _C.read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", [b"lr: 0.1\n", b"\x89PNG\r\n\x1a\n", bytes(1000), random.Random(0).randbytes(999)])
def test_foreign_files(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"'.*a\.pt' is not a torch.save file: it does not start as a zip archive$"):
        _C.read_state_dict(tmp_path / "a.pt")


def test_compressed_archive(tmp_path):
    torch.save([1] * 1000, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(RuntimeError, match="compressed or encrypted"):
        _C.read_state_dict(tmp_path / "b.pt")


def test_every_truncation_of_a_python_file(tmp_path):
    _, optimizer = trained(torch.optim.AdamW, lr=0.01)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    for size in reversed(range((tmp_path / "a.pt").stat().st_size)):
        os.truncate(tmp_path / "a.pt", size)
        with pytest.raises(RuntimeError, match=r"a\.pt' is (truncated|empty)"):
            _C.read_state_dict(tmp_path / "a.pt")


def test_flipped_bytes_never_give_other_values(tmp_path):
    _, optimizer = trained(torch.optim.AdamW, lr=0.01)
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    rng = random.Random(0)
    for position in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[position] ^= rng.randrange(1, 256)
        (tmp_path / "b.pt").write_bytes(flipped)
        try:
            loaded = _C.read_state_dict(tmp_path / "b.pt")
        except RuntimeError as error:
            assert "b.pt' is" in str(error)  # noqa: PT017
        else:
            assert_same(loaded, state)
