"""Nothing in a micro-batch makes the host wait for the device, nor in a step whose update the device guards.

The step runs on the meta device, which has no numbers to wait for: whatever would read one fails or is noticed, and so
is a copy to it that isn't asynchronous.
"""

import contextlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.training import loop, pending_step
from library.training.settling import is_wanted
from library.training.step import training_loss
from tests.conftest import Trainer

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
NOISE = {
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.05,
    "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1,
    "min_snr_gamma": 5,
}
DRAWN = {"caption_dropout_rate": 0.5, "clip_g_dropout_rate": 0.5, "t5_dropout_rate": 0.5, "pos_emb_random_crop_rate": 1}
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::equal")


class Waits(TorchDispatchMode):
    """Finds what waits for the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        on_device = any(isinstance(one, Tensor) and one.is_meta for one in args)
        if name == "aten::_to_copy":
            there = kwargs.get("device") or args[0].device
            if torch.device(there).type != args[0].device.type and not kwargs.get("non_blocking"):
                self.found.append(f"{name} from {args[0].device} to {there}")
        elif name == "aten::copy_":
            if args[0].device.type != args[1].device.type and not (args[2] if len(args) > 2 else False):
                self.found.append(f"{name} from {args[1].device} to {args[0].device}")
        elif on_device and name.startswith(WAITING):
            self.found.append(name)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def autocast_for_meta(monkeypatch):
    """torch knows no autocast for a device without numbers."""
    autocast = torch.autocast

    def chosen(device_type, *arguments, **named):
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **named)

    monkeypatch.setattr(torch, "autocast", chosen)


def with_teacher(trainer):
    """Pictures that the base model teaches, in one micro-batch with others."""
    folders = [shutil.copytree(trainer.photos, trainer.folder / name) for name in ("taught", "ordinary")]
    taught, ordinary = (json.dumps(str(folder)) for folder in folders)
    path = trainer.dataset(dataset="enable_bucket = false")
    text = path.read_text()
    head = text[: text.index("[[datasets.subsets]]")].replace("batch_size = 2", "batch_size = 8")
    path.write_text(
        f"{head}[[datasets.subsets]]\nimage_dir = {taught}\nis_regularisation_data = true\n"
        f"[[datasets.subsets]]\nimage_dir = {ordinary}\n"
    )
    return path


@pytest.mark.parametrize(
    ("family", "network", "options"),
    [
        pytest.param("sd3", True, {"gradient_checkpointing": True, **DRAWN}, id="sd3 adapter"),
        pytest.param("sd3", True, {"enable_scaled_pos_embed": True, **DRAWN}, id="sd3 scaled positions"),
        pytest.param("sd3", True, {"network_dropout": 0.5, "network_args": ["rank_dropout=0.3"]}, id="dropout"),
        pytest.param("sd3", True, {"prior": True}, id="teacher"),
        pytest.param("sd3", False, {"loss_type": "huber", "huber_schedule": "exponential"}, id="sd3 full"),
        pytest.param("sana", True, {"gradient_checkpointing": True, "caption_dropout_rate": 0.5}, id="sana adapter"),
        pytest.param("sana", False, {"weighting_scheme": "cosmap"}, id="sana full"),
        pytest.param("sd", True, NOISE, id="sd adapter, noise of every kind"),
        pytest.param("sd", False, {"loss_type": "huber", "v_parameterization": True}, id="sd full"),
    ],
)
def test_a_micro_batch_never_waits(tiny_file, tiny_sana_file, tiny_sd_file, photos, tmp_path, family, network, options):
    model = {"sd3": tiny_file, "sana": tiny_sana_file, "sd": tiny_sd_file}[family]
    trainer = Trainer(model, photos, tmp_path, family, "adapter" if network else "full")
    if network:
        options = {"network_train_unet_only": True, **options}
    if options.pop("prior", False):
        options["dataset_config"] = with_teacher(trainer)

    def act(run):
        batches = [next(run.batches) for _ in range(2)]
        run.denoiser.to("meta")
        run.trainable.to("meta")
        run.accelerator = SimpleNamespace(device=torch.device("meta"), autocast=contextlib.nullcontext)
        waits = Waits()
        with waits:
            for batch in batches:
                share = training_loss(run, batch, step_samples=len(batch))
                share.loss.backward()
        assert share.loss.is_meta
        return waits.found

    assert trainer.with_run("out", act, **CACHED, **options) == []


class Arrival:
    """Numbers on their way: notes how many steps were computed when somebody waited for them."""

    def __init__(self, computed: list[int], waited: list[tuple[int, int]]):
        self.step, self.computed, self.waited = len(computed), computed, waited

    def synchronize(self):
        self.waited.append((self.step, len(self.computed)))


def put_on_meta(run, monkeypatch):
    """The run with its model and what it trains on the device without numbers."""
    meta, optimizer = torch.device("meta"), run.optimizer.optimizer
    names = {parameter: name for name, parameter in run.trainable.named_parameters()}
    run.denoiser.to(meta)
    run.trainable.to(meta)
    moved = dict(run.trainable.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [moved[names[parameter]] for parameter in group["params"]]
    monkeypatch.setattr(type(run.accelerator), "device", property(lambda accelerator: meta))
    # torch names the devices that its kernels are for
    code = sys.modules[type(optimizer)._init_group.__module__]
    monkeypatch.setattr(code, "_device_dtype_check_for_fused", lambda parameter: None)


@pytest.mark.parametrize("family", ["trainer", "sana_trainer"])
def test_a_guarded_step_never_waits(request, monkeypatch, family):
    trainer = request.getfixturevalue(family)
    computed, waited = [], []
    compute = loop.compute

    def noted(run, step, source):
        answer = compute(run, step, source)
        computed.append(step)
        return answer

    def act(run):
        put_on_meta(run, monkeypatch)
        monkeypatch.setattr(loop, "compute", noted)
        monkeypatch.setattr(
            pending_step, "_to_host", lambda numbers: (torch.zeros(numbers.shape), Arrival(computed, waited))
        )
        waits = Waits()
        with waits:
            for step in range(4):
                loop.optimize(run, step)
                assert not is_wanted(run, step + 1)
        return waits.found

    options = {"optimizer_args": ["fused=True"], "gradient_accumulation_steps": 2, "max_train_steps": 8}
    if trainer.network:
        options["network_train_unet_only"] = True
    assert trainer.with_run("out", act, **CACHED, **options) == []
    assert waited == [(1, 2), (2, 3), (3, 4)]  # each when the next step was on its way
    assert [entry["step"] for entry in trainer.log("out")] == [1, 2, 3]
