"""One side of benchmarks/cpu.py and benchmarks/gpu.py: a step of a ViT-MAE in its own process.

  python -m benchmarks.mae_step SPEC       SPEC is a JSON object with the fields of Spec

Prints a JSON line once the step is compiled and has run; then reads numbers of steps from standard input, runs as many and prints
a line for each. Every side gets float32 images on the device and does forward, backward and AdamW, or the encoder on whole
images and the mean of its patch tokens. Augmentation and input are not measured. Parameters are float32.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from curia_common.errors import UserError

SIDES = ("jax", "transformers", "timm")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is run.

    Attributes:
      side: "jax", this project's model; "transformers", its ViTMAE; "timm", a MAE of timm's blocks: fused qkv and SDPA.
      task: "train" or "features".
      model: the `model` section of a run's config; its dtype is that of the matmuls on every side.
      batch: images.
      platform: "cpu" or "cuda".
      compiled: torch.compile.
      cores: number of CPU cores for the process, where the system allows it, and of PyTorch's threads; 0 for all.
    """

    side: str
    task: str
    model: dict[str, Any]
    batch: int
    platform: str = "cpu"
    compiled: bool = False
    cores: int = 0


Step = Callable[[], Any]  # dispatches a step; the side's `wait` blocks on its result


def jax_side(spec: Spec) -> tuple[Step, Callable[[Any], float], dict[str, Any]]:
    """A step, a function that waits for its result (the loss, or the mean feature), and facts."""
    import jax
    import jax.numpy as jnp
    import ml_collections
    import optax

    from curia_jax import optimizer, xla_flags
    from curia_jax.models import mae, vit

    model = mae.config(**spec.model)
    params = mae.init(model, jax.random.key(0))
    encoder = model.encoder
    images = jax.random.normal(jax.random.key(1), (spec.batch, *encoder.image_size, encoder.channels))
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
    }
    if spec.task == "features":

        @jax.jit
        def features(params: Any, images: Any) -> Any:
            return vit.bind(encoder, params)(images)[:, 1:].mean(axis=1)

        return lambda: features(params["encoder"], images), lambda out: float(jnp.mean(out)), facts

    settings = ml_collections.ConfigDict(
        {"base_learning_rate": 1e-4 * 256 / spec.batch, "b1": 0.9, "b2": 0.95, "weight_decay": 0.05, "clip_norm": None}
    )
    transform, _ = optimizer.make(settings, batch_size=spec.batch, warmup_steps=1, total_steps=10**6)

    def step(state: Any, images: Any) -> Any:
        params, opt_state, number = state
        noise = jax.random.uniform(jax.random.fold_in(jax.random.key(2), number), (spec.batch, encoder.patches))
        loss, gradients = jax.value_and_grad(lambda p: mae.bind(model, p)(images, noise).loss)(params)
        updates, opt_state = transform.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, number + 1), loss

    state = [(params, jax.jit(transform.init)(params), jnp.zeros((), jnp.int32))]
    options = xla_flags.compiler_options(facts["device"], replicas=1)
    compiled = jax.jit(step, donate_argnums=0).lower(state[0], images).compile(compiler_options=dict(options))

    def run() -> Any:
        state[0], loss = compiled(state[0], images)
        return loss

    return run, float, facts


def torch_side(spec: Spec) -> tuple[Step, Callable[[Any], float], dict[str, Any]]:
    """As jax_side, with transformers or timm's blocks."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(spec.cores or os.cpu_count() or 1)
    if spec.platform == "cuda":
        torch.set_float32_matmul_precision("high")
    device = torch.device(spec.platform)
    model = (transformers_mae if spec.side == "transformers" else timm_mae)(spec.model).to(device)
    height, width = spec.model["image_size"]
    images = torch.randn(spec.batch, spec.model["channels"], height, width, device=device)
    half = spec.model["dtype"] == "bfloat16"

    def products() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()

    facts = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": torch.cuda.get_device_name() if spec.platform == "cuda" else "cpu",
        "version": f"torch {torch.__version__}",
    }
    if spec.task == "features":
        model.eval()
        encode = torch.compile(model.features) if spec.compiled else model.features

        def features() -> Any:
            with torch.inference_mode(), products():
                return encode(images)

        return features, lambda out: float(out.mean()), facts

    forward = torch.compile(model) if spec.compiled else model
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )

    def run() -> Any:
        with products():
            loss = forward(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run, float, facts


def transformers_mae(model: Mapping[str, Any]) -> Any:
    """transformers' ViTMAEForPreTraining of these shapes, which have to be square; images -> loss."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder = _shapes(model)
    config = ViTMAEConfig(
        hidden_size=encoder.width, num_hidden_layers=encoder.depth, num_attention_heads=encoder.heads,
        intermediate_size=encoder.mlp_width, hidden_act="gelu_pytorch_tanh" if encoder.activation == "gelu_tanh" else "gelu",
        image_size=encoder.image_size[0], patch_size=encoder.patch_size[0], num_channels=encoder.channels,
        decoder_hidden_size=model["decoder_width"], decoder_num_hidden_layers=model["decoder_depth"],
        decoder_num_attention_heads=model["decoder_heads"], decoder_intermediate_size=4 * model["decoder_width"],
        mask_ratio=model["mask_ratio"], norm_pix_loss=model["norm_pix"],
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - of the base class, missing in its stub
    )  # fmt: skip

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mae = ViTMAEForPreTraining(config)

        def forward(self, images: Any) -> Any:
            return self.mae(images).loss

        def features(self, images: Any) -> Any:
            """Mean patch token of the whole image; the encoder sees all of it with a mask ratio of 0."""
            vit = self.mae.vit
            vit.embeddings.config.mask_ratio = 0.0
            return vit(images).last_hidden_state[:, 1:].mean(dim=1)

    return Loss()


def timm_mae(model: Mapping[str, Any]) -> Any:
    """facebookresearch/mae built from timm-like blocks with scaled_dot_product_attention; images -> loss."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    from curia_jax.models import vit

    encoder = _shapes(model)
    width, decoder_width = encoder.width, model["decoder_width"]
    visible = int(encoder.patches * (1 - model["mask_ratio"]))
    eps, approximate = encoder.layer_norm_eps, "tanh" if encoder.activation == "gelu_tanh" else "none"
    rows, columns = encoder.patch_size

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, mlp_width: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

        def forward(self, x: Any) -> Any:
            batch, tokens, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
            x = x + self.proj(y)
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate=approximate))

    class MAE(nn.Module):
        position: torch.Tensor
        decoder_position: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            values = encoder.patch_values
            self.patch_embed = nn.Conv2d(encoder.channels, width, encoder.patch_size, stride=encoder.patch_size)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
            for name, size in (("position", width), ("decoder_position", decoder_width)):
                table = np.asarray(vit.position_table(size, encoder.grid), np.float32)
                self.register_buffer(name, torch.from_numpy(table)[None])
            self.blocks = nn.ModuleList(Block(width, encoder.heads, encoder.mlp_width) for _ in range(encoder.depth))
            self.norm = nn.LayerNorm(width, eps)
            self.decoder_embed = nn.Linear(width, decoder_width)
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_width, model["decoder_heads"], 4 * decoder_width) for _ in range(model["decoder_depth"])
            )
            self.decoder_norm = nn.LayerNorm(decoder_width, eps)
            self.pred = nn.Linear(decoder_width, values)
            for token in (self.cls_token, self.mask_token):
                nn.init.normal_(token, std=0.02)

        def encode(self, x: Any) -> Any:
            cls = (self.cls_token + self.position[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([cls, x], dim=1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

        def embed(self, images: Any) -> Any:
            return self.patch_embed(images).flatten(2).transpose(1, 2) + self.position[:, 1:]

        def features(self, images: Any) -> Any:
            return self.encode(self.embed(images))[:, 1:].mean(dim=1)

        def forward(self, images: Any) -> Any:
            x = self.embed(images)
            shuffled = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
            restore = shuffled.argsort(dim=1)
            x = self.encode(x.gather(1, shuffled[:, :visible, None].expand(-1, -1, width)))
            x = self.decoder_embed(x)
            hidden = self.mask_token.expand(len(x), encoder.patches - visible, -1).to(x.dtype)
            ordered = torch.cat([x[:, 1:], hidden], dim=1).gather(1, restore[:, :, None].expand(-1, -1, decoder_width))
            x = torch.cat([x[:, :1], ordered], dim=1) + self.decoder_position
            for block in self.decoder_blocks:
                x = block(x)
            prediction = self.pred(self.decoder_norm(x))[:, 1:].float()
            batch, channels = images.shape[:2]
            target = images.reshape(batch, channels, encoder.grid[0], rows, encoder.grid[1], columns)
            target = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, encoder.patches, -1)
            if model["norm_pix"]:
                deviation = (target.var(dim=-1, keepdim=True) + model["norm_pix_eps"]).sqrt()
                target = (target - target.mean(dim=-1, keepdim=True)) / deviation
            mask = (restore >= visible).float()
            return ((prediction - target).square().mean(dim=-1) * mask).sum() / mask.sum()

    return MAE()


def _shapes(model: Mapping[str, Any]) -> Any:
    from curia_jax.models import mae

    return mae.config(**model).encoder


# ---- the process


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mae_step", description=__doc__)
    parser.add_argument("spec", type=json.loads)
    spec = Spec(**parser.parse_args(argv).spec)
    try:
        run, wait, facts = (jax_side if spec.side == "jax" else torch_side)(spec)
        for _ in range(2):
            value = wait(run())
        if spec.cores and os.path.isdir("/proc/self/task"):
            # After the thread pools exist: XLA's deadlocks if it starts on a single core.
            for task in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(task), sorted(os.sched_getaffinity(0))[-spec.cores :])
        print(json.dumps(facts | {"value": value}), flush=True)
        for line in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(int(line)):
                last = run()
            took = {
                "value": wait(last),
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu,
            }
            print(json.dumps(took), flush=True)
    except Exception as error:  # the libraries raise their own kinds
        if not any(words in str(error).lower() for words in ("out of memory", "resource_exhausted")):
            raise
        print(json.dumps({"error": "out of memory"}), flush=True)
    return 0


class Side:
    """A step in its own process.

    Attributes:
      facts: parameters, device, version, value; {"error": "out of memory"} where the batch does not fit.

    Raises:
      UserError: the process failed; its message is on standard error.
    """

    def __init__(self, spec: Spec, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.mae_step", json.dumps(dataclasses.asdict(spec))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment),
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self.facts = self._read()
        except UserError:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise UserError(f"the step of {self.spec.side} failed; its message is above")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, float]:
        """Runs so many steps: {"seconds", "cpu_seconds", "value"}."""
        self._requests.write(f"{steps}\n")
        self._requests.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._answers.close()


def need_torch() -> None:
    """Raises UserError unless both libraries of the PyTorch sides are installed."""
    if not find_spec("torch") or not find_spec("transformers"):
        raise UserError(
            "nothing to compare with: torch or transformers is not installed; pip install 'curia-jax[torch]'"
        )


def check_same_model(parameters: Mapping[str, int]) -> None:
    """Raises UserError unless every side has the same number of parameters."""
    if len(set(parameters.values())) > 1:
        raise UserError(f"the sides have different models: {dict(parameters)} parameters")


if __name__ == "__main__":
    sys.exit(main())
