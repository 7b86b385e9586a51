"""The public names: every one that is listed here is there, and every one that is public is listed.

Transforms and presets are found by themselves, so that a new one joins no list; those of a release are
listed, since none may go without a word in the changelog.
"""

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import heavyball
from heavyball.presets import NAMES

C = heavyball.chainable
TRANSFORMS = """
a_law accumulate adamc adaptive_gradient_clip adaptive_orthogonalize apply cautious cautious_decay
centralize clip_by_global_norm clip_by_norm clip_by_rms clip_update_rms coupled decay_to_ema decoupled
delayed_rms descend exp_avg factored_rms focus from_eigenbasis grams heavyball_momentum in_new_unit
independent l1_decay l2_normalize mars maximize mu_law muon muon_momentum nesterov_momentum
orthogonalize orthograd palm_beta2 palm_decay parameter_ema prodigy_d prodigy_plus_d
prodigy_progress_d psgd_kron psgd_lra psgd_pro regularized rms_normalize scale_by_adam
scale_by_adam_atan2 scale_by_ademamix scale_by_adopt scale_by_exp_avg_sq scale_by_laprop
scale_by_lion scale_by_nadam scale_by_normuon scale_by_rms scale_by_tensor_rms scale_lr schedule_free
separate_decay shampoo sign skip_not_finite softsign stable_adamw to_eigenbasis trust_region
"""
PRESETS = """
ADOPT AdEMAMix AdamW CachedDelayedPSGDKron CachedPSGDKron DelayedPSGD DelayedPSGDKron FactoredAdamW
Focus LaProp Lion
Muon NAdam NorMuon PSGDKron PSGDLRA PSGDPRO PaLMSFAdamW PaLMSOAP PrecondSchedulePaLMSOAP
PrecondScheduleProdigySOAP PrecondScheduleSFPaLMSOAP PrecondScheduleSOAP Prodigy
ProdigyPlusScheduleFree PurePSGD RMSprop SFAdamW SFPaLMSOAP SGD SOAP SOAPAdEMAMix SOAPNAdam SOLP
Shampoo
"""
# What each module has beside transforms and presets.
OTHERS = {
    "heavyball": """
        FusedBackward MemoryPlan PRESETS PrecondSchedule chainable checkpoint create fuse_backward
        memory_plan scion_init_ utils
    """,
    "heavyball.chainable": """
        COMBINATORS ChainOpt Interval Live Member Rate State TRANSFORMS Transform Whole
        beta_of_batch beta_of_half_life constant copy_of_param cosine cosine_restarts exponential
        fira galore graft inverse_sqrt lather_precond linear one_cycle optimizer_class parallel
        parse polynomial power ramp rate rex route scalar schedule shared soap_precond squares step
        transform when whole_transform within wsd zeros
    """,
    "heavyball.presets": "CLIPPINGS DEFAULTS PRESETS Preset PresetOptions",
    "heavyball.utils": "compile_mode set_torch zeroth_power_mode",
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_names_of_a_module_are_those_listed(name: str) -> None:
    module = importlib.import_module(name)
    public = set(module.__all__)
    assert len(module.__all__) == len(public)
    assert public - C.TRANSFORMS.keys() - NAMES.keys() == set(OTHERS[name].split())
    assert all(hasattr(module, each) for each in public)
    assert public <= set(dir(module))


def test_every_transform_and_preset_of_the_release_is_public() -> None:
    assert set(TRANSFORMS.split()) <= C.TRANSFORMS.keys()
    assert set(PRESETS.split()) <= NAMES.keys()
    assert C.TRANSFORMS.keys() <= set(C.__all__)
    assert NAMES.keys() <= set(heavyball.__all__)


@pytest.mark.parametrize("name", OTHERS)
def test_a_name_that_is_not_there_is_refused_with_the_nearest(name: str) -> None:
    module = importlib.import_module(name)
    assert isinstance(module, types.ModuleType)
    known = OTHERS[name].split()[0]
    with pytest.raises(AttributeError, match=known):
        getattr(module, known[:-1])


# ---- the tests read public names

TESTS = Path(__file__).parent
# Names of Python and torch that the library reads as well.
OTHERS_OWN = {"_getframe", "_version", "_cdata", "_dynamo"}
# What has no public form yet, with the reason. This list may only become shorter.
DEVICE = "stands for what only a GPU has"
PRIVATE = {
    "distributed/test_mistakes.py": {"_count": "a mistake is planted there"},
    "kernels_on_triton.py": dict.fromkeys(
        ("_captured", "_capturing", "_pinned_like", "_start"), DEVICE
    ),
}


def private_reads(source: str) -> Iterator[str]:
    """Attributes with an underscore that are read of anything but `self`, patched, or imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("heavyball"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("setattr", "getattr", "patch.object")
        ):
            yield from (str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant))


def private_names() -> set[str]:
    """Every name of one underscore that the library gives to an attribute, a function or a class."""
    package = Path(heavyball.__file__).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    return set(re.findall(r"(?<![\w])_[a-zA-Z]\w*", text)) - OTHERS_OWN


def test_no_test_reads_a_private_name_of_the_library() -> None:
    names = private_names()
    for path in TESTS.rglob("*.py"):
        found = names.intersection(private_reads(path.read_text()))
        assert found <= PRIVATE.get(path.relative_to(TESTS).as_posix(), {}).keys(), path.name


def test_a_private_read_is_seen() -> None:
    source = """
from heavyball.optim import _checks
opt._engine.plan
self._mine
monkeypatch.setattr(opt, "_x", 1)
"""
    assert {n for n in private_reads(source) if n.startswith("_")} == {"_checks", "_engine", "_x"}
