"""The patches by which Megatron-core runs on a CPU."""

import importlib
import os

import pytest
import torch

from megatron_mesh.runtime import device


def resolve(name: str):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", device.CPU_PATCHES)
def test_every_patched_name_exists(name: str) -> None:
    assert callable(resolve(name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without a GPU")
def test_names_mean_the_cpu() -> None:
    device.prepare()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_device_contexts_still_work() -> None:
    device.prepare()
    with torch.device("meta"):
        for make in (torch.empty, torch.zeros, torch.ones):
            assert make(2).device.type == "meta"
        assert torch.tensor([1.0]).device.type == "meta"


def test_a_second_prepare_patches_nothing() -> None:
    device.prepare()
    before = torch.zeros
    device.prepare()
    assert torch.zeros is before


@pytest.mark.parametrize("given, used", [(None, "1"), ("8", "8")])
def test_sends_hide_behind_products_up_to_hopper(monkeypatch, given: str | None, used: str) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    device.prepare()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == used


def test_describe_names_what_is_missing() -> None:
    line = device.describe()
    assert "\n" not in line
    for module, label in (("transformer_engine", "Transformer Engine"), ("apex", "apex")):
        assert (label in line) == (importlib.util.find_spec(module) is None)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H200", 989.4e12, 1978.8e12),
        ("NVIDIA H200 NVL", 835.5e12, 1671e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 1978.8e12),
        ("NVIDIA H100 PCIe", 756e12, 1512e12),
        ("NVIDIA H100 NVL", 835.5e12, 1671e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA B200", 2250e12, 4500e12),
        ("NVIDIA GB200", 2500e12, 5000e12),
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA H20", None, None),
    ],
)
def test_peak_of_the_data_sheet(
    name: str, bf16: float | None, fp8: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "why_no_fp8", lambda: "too old" if "A100" in name else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert (device.peak_flops(), device.peak_flops(fp8=True)) == (bf16, fp8)


def test_rng_state_round_trip() -> None:
    state = device.rng_state()
    first = torch.rand(4)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
