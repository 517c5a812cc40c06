"""tests/optim_db.json is what the reference computes, and is complete."""

import json
from typing import Any

import pytest

from torch_ext.reference.optim import AdaHessianReference, EggrollReference, MeZOReference, MFACReference
from torch_ext.reference.optim.adahessian import OPTION_NAMES
from torch_ext.reference.optim.alflb import ALFLBReferenceOptions
from torch_ext.reference.optim.eggroll import OPTION_NAMES as EGGROLL_OPTION_NAMES
from torch_ext.reference.optim.mezo import OPTION_NAMES as MEZO_OPTION_NAMES
from torch_ext.reference.optim.mfac import OPTION_NAMES as MFAC_OPTION_NAMES
from torch_ext.testing import problems
from torch_ext.testing.make_optim_db import (
    ADAHESSIAN_VARIANTS,
    ALFLB_VARIANTS,
    EGGROLL_VARIANTS,
    MEZO_VARIANTS,
    MFAC_VARIANTS,
    PATH,
    ROWS,
    adahessian,
    alflb,
    difference,
    dumps,
    eggroll,
    mezo,
    mfac,
)

TABLE: dict[str, Any] = json.loads(PATH.read_text())


def test_every_row_is_there() -> None:
    assert set(ROWS) <= set(TABLE)
    assert [v["name"] for v in TABLE["AdaHessian"]["variants"]] == list(ADAHESSIAN_VARIANTS)
    varied = {name for options in ADAHESSIAN_VARIANTS.values() for name in options}
    assert varied == set(OPTION_NAMES)
    assert [v["name"] for v in TABLE["MFAC"]["variants"]] == list(MFAC_VARIANTS)
    varied = {name for options in MFAC_VARIANTS.values() for name in options}
    assert varied == set(MFAC_OPTION_NAMES) | {"window_device"}
    assert [v["name"] for v in TABLE["ALFLB"]["variants"]] == list(ALFLB_VARIANTS)
    assert {name for options in ALFLB_VARIANTS.values() for name in options} == set(vars(ALFLBReferenceOptions()))
    for name, variants, names in (
        ("Eggroll", EGGROLL_VARIANTS, EGGROLL_OPTION_NAMES),
        ("MeZO", MEZO_VARIANTS, MEZO_OPTION_NAMES),
    ):
        assert [v["name"] for v in TABLE[name]["variants"]] == list(variants)
        assert {option for options in variants.values() for option in options} == set(names)


def test_the_file_is_the_writers_text() -> None:
    assert dumps(TABLE) + "\n" == PATH.read_text()


@pytest.mark.parametrize("variant", list(ADAHESSIAN_VARIANTS))
def test_first_hundred_steps(variant: str) -> None:
    (new,) = adahessian([variant], iterations=101)["variants"]
    old = next(v for v in TABLE["AdaHessian"]["variants"] if v["name"] == variant)
    for key in ("options", "loss_sign", "rtol"):
        assert old[key] == new[key]
    assert new["trajectory"]["iterations"] == [0, 100]
    assert difference(old["trajectory"], new["trajectory"]) <= old["rtol"]


@pytest.mark.parametrize("variant", list(MFAC_VARIANTS))
def test_first_hundred_steps_of_mfac(variant: str) -> None:
    (new,) = mfac([variant], iterations=101)["variants"]
    old = next(v for v in TABLE["MFAC"]["variants"] if v["name"] == variant)
    for key in ("options", "loss_sign", "rtol"):
        assert old[key] == new[key]
    assert new["trajectory"]["iterations"] in ([0, 100], [0, 5, 10, 15])
    assert difference(old["trajectory"], new["trajectory"]) <= old["rtol"]


@pytest.mark.parametrize("variant", list(ALFLB_VARIANTS))
def test_trajectories_of_alflb(variant: str) -> None:
    """All steps; every rule lowers the dual value, whose least value on these scores is 9.4575."""
    (new,) = alflb([variant])["variants"]
    old = next(v for v in TABLE["ALFLB"]["variants"] if v["name"] == variant)
    assert old["options"] == new["options"]
    assert difference(old["trajectory"], new["trajectory"]) <= old["rtol"]
    loss = new["trajectory"]["loss"]
    assert 9.457 < loss[-1] < 9.48 < loss[0]


def test_trajectories_of_mfac_converge_and_differ() -> None:
    texts = []
    for variant in TABLE["MFAC"]["variants"]:
        path = variant["trajectory"]
        assert path["loss"][-1] < (0.122 if path["iterations"][-1] == 1000 else 0.4)
        texts.append(json.dumps([path["iterations"], path["parameters"]]))
    names = [variant["name"] for variant in TABLE["MFAC"]["variants"]]
    assert texts.pop(names.index("maximize")) == texts[names.index("short_window")]
    assert len(set(texts)) == len(texts)


def test_trajectories_converge_and_differ() -> None:
    last = {}
    for variant in TABLE["AdaHessian"]["variants"]:
        path = variant["trajectory"]
        assert path["iterations"] == list(range(0, 1001, 100))
        assert path["loss"][-1] < 0.125 < 0.7 < path["loss"][0]
        last[variant["name"]] = path["parameters"]
    assert last.pop("maximize") == last["default"]
    texts = [json.dumps(p) for p in last.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("options", "word"), TABLE["AdaHessian"]["options_bad"])
def test_bad_options_name_the_option(options: dict[str, Any], word: str) -> None:
    params, _ = problems.tanh_layer()
    with pytest.raises(ValueError, match=rf"AdaHessian: {word} must"):
        AdaHessianReference(list(params.values()), **options)


@pytest.mark.parametrize(("options", "word"), TABLE["MFAC"]["options_bad"])
def test_bad_options_of_mfac_name_the_option(options: dict[str, Any], word: str) -> None:
    if word == "window_device":
        pytest.skip("the reference has no devices")
    params, _ = problems.tanh_layer()
    with pytest.raises(ValueError, match=rf"MFAC: {word} must"):
        MFACReference(list(params.values()), **options)


@pytest.mark.parametrize("variant", list(EGGROLL_VARIANTS))
def test_first_steps_of_eggroll(variant: str) -> None:
    (new,) = eggroll([variant], iterations=21)["variants"]
    old = next(v for v in TABLE["Eggroll"]["variants"] if v["name"] == variant)
    assert (old["options"], old["loss_sign"], old["rtol"]) == (new["options"], new["loss_sign"], new["rtol"])
    assert new["trajectory"]["iterations"] == [0, 20]
    assert difference(old["trajectory"], new["trajectory"]) <= old["rtol"]


@pytest.mark.parametrize("variant", list(MEZO_VARIANTS))
def test_first_hundred_steps_of_mezo(variant: str) -> None:
    (new,) = mezo([variant], iterations=101)["variants"]
    old = next(v for v in TABLE["MeZO"]["variants"] if v["name"] == variant)
    assert (old["options"], old["loss_sign"], old["rtol"]) == (new["options"], new["loss_sign"], new["rtol"])
    assert difference(old["trajectory"], new["trajectory"]) <= old["rtol"]


@pytest.mark.parametrize("name", ["Eggroll", "MeZO"])
def test_trajectories_of_losses_alone_descend_and_differ(name: str) -> None:
    texts = []
    for variant in TABLE[name]["variants"]:
        path = variant["trajectory"]
        assert path["loss"][-1] < path["loss"][0]
        assert variant["name"] == "default" or path["loss"][-1] < 0.4
        texts.append(json.dumps(path["parameters"]))
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("name", "make"), [("Eggroll", EggrollReference), ("MeZO", MeZOReference)], ids=["Eggroll", "MeZO"]
)
def test_bad_options_of_losses_alone_name_the_option(name: str, make: Any) -> None:
    params, _ = problems.tanh_layer()
    for options, word in TABLE[name]["options_bad"]:
        with pytest.raises(ValueError, match=rf"{name}: {word} must"):
            make(list(params.values()), **options)
