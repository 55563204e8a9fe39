"""FLUX.1's network in PyTorch (diffusers' FluxTransformer2DModel, tiny, random) beside ours, layer by layer and whole.

python -m tests.oracles.flux            prints relative errors; needs torch and diffusers
python -m tests.oracles.flux --write    writes tests/weights/flux.safetensors, which the tests read without them

Three axes of positions make it a video model: the oracle gets (t, h, w) of every token.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from paris_jax.artifacts.tensors import Tensors
from paris_jax.models import functional
from paris_jax.models.attention import attend
from paris_jax.models.dit import DiTConfig, DoubleBlock, SingleBlock, _rope, pack, unpack
from paris_jax.weights import convert

FIXTURE = Path(__file__).parents[1] / "weights" / "flux.safetensors"
CONFIG = DiTConfig(
    channels=2,
    text_width=12,
    pooled_width=10,
    hidden=32,
    heads=2,
    double_blocks=2,
    single_blocks=2,
    rope_axes=(4, 6, 6),
)
CASES = {"video": (2, 3, 3, 5, 4), "image": (1, 1, 2, 7, 6), "long": (1, 9, 1, 2, 1)}  # B, T, rows, columns, L
DTYPES = ("float32", "bfloat16")


def inputs(case: str) -> dict[str, np.ndarray]:
    """x (B, N, 4 C), text (B, L, 12), pooled (B, 10), t (B,), float32.

    In bfloat16 the oracle rounds 1000 t, too: these times lose nothing by it.
    """
    B, T, H, W, L = CASES[case]
    rng = np.random.default_rng(len(case))
    drawn = {"x": (B, T * H * W, 8), "text": (B, L, 12), "pooled": (B, 10)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in drawn.items()}
    return made | {"t": np.array([0.25, 0.5], np.float32)[:B]}


def theirs() -> dict[str, np.ndarray]:
    """Weights, and what the oracle makes of every case: "weights/NAME", "CASE/DTYPE/WHERE"."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": False}
    model = FluxTransformer2DModel(
        **sizes,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in model.parameters():  # values that bfloat16 holds exactly, so that files may be half as large
        torch.nn.init.normal_(parameter, 0.0, 0.25)
        parameter.data = parameter.data.to(torch.bfloat16).float()
    found = {f"weights/{name}": _bfloat16(tensor) for name, tensor in model.state_dict().items()}
    for dtype in DTYPES:
        model = model.to(getattr(torch, dtype))
        for case in CASES:
            found |= {f"{case}/{dtype}/{where}": value for where, value in _run(model, case, dtype).items()}
    return found


def _bfloat16(tensor) -> np.ndarray:
    return np.asarray(tensor.float().numpy(), jnp.bfloat16)


def _run(model, case: str, dtype: str) -> dict[str, np.ndarray]:
    import torch

    _, T, H, W, L = CASES[case]
    made, seen = {k: torch.tensor(v).to(getattr(torch, dtype)) for k, v in inputs(case).items()}, {}

    def keep(name):
        def hook(_, __, output):
            pair = output if isinstance(output, tuple) else (output,)
            for kind, value in zip(("text", "video"), pair, strict=False):
                seen[f"{name}.{kind}"] = np.ascontiguousarray(value.detach().float().numpy())

        return hook

    hooks = [b.register_forward_hook(keep(f"double.{i}")) for i, b in enumerate(model.transformer_blocks)]
    hooks += [b.register_forward_hook(keep(f"single.{i}")) for i, b in enumerate(model.single_transformer_blocks)]
    ids = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (T, H, W)), indexing="ij"), -1).reshape(-1, 3).float()
    with torch.no_grad():
        condition = {"pooled_projections": made["pooled"], "encoder_hidden_states": made["text"], "timestep": made["t"]}
        places = {"img_ids": ids, "txt_ids": torch.zeros(L, 3)}
        out = model(hidden_states=made["x"], **condition, **places, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    kept = seen if dtype == "float32" and case == "video" else {}
    return kept | {"out": out.float().numpy()}


def parameters(weights: dict[str, np.ndarray], folder: Path) -> functional.Params:
    """The oracle's weights as ours, through a file."""
    safetensors.numpy.save_file(weights, folder / "theirs.safetensors")
    tensors = Tensors(folder / "theirs.safetensors")
    report = convert.check(tensors, CONFIG, "diffusers")
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in convert.to_ours(tensors, CONFIG, report):
        stacks.setdefault(name, []).append(values.astype(np.float32))
    blocks = functional.BLOCKS
    flat = {n: np.stack(v) if n.split(".")[0] in blocks else v[0] for n, v in stacks.items()}
    return functional.from_names(jax.tree.map(jnp.asarray, flat))


def ours(params: functional.Params, case: str, dtype: str, more_text: int = 0) -> np.ndarray:
    """Our network on a case, with so much padding behind the text: (B, N, 4 C)."""
    B, T, H, W, L = CASES[case]
    made = inputs(case)
    config = DiTConfig(**{**CONFIG.__dict__, "dtype": dtype})
    x = unpack(jnp.asarray(made["x"]), (B, T, 2 * H, 2 * W, 2))
    text = jnp.pad(jnp.asarray(made["text"]), ((0, 0), (0, more_text), (0, 0)), constant_values=3.0)
    length = jnp.full(B, L, jnp.int32)
    v = functional.apply(config, params, x, jnp.asarray(made["t"]), text, length, jnp.asarray(made["pooled"]))
    return np.asarray(pack(v))


def blocks(params: functional.Params, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative error of every block, each on what the oracle gave to it, of the case "video" in float32."""
    _, T, H, W, L = CASES["video"]
    case, N, errors = "video/float32/", T * H * W, {}
    made = inputs("video")
    module = nnx.merge(*_merged(params))
    video, text = module.video_in(jnp.asarray(made["x"])), module.text_in(jnp.asarray(made["text"]))
    condition = module.conditioning(jnp.asarray(made["t"]), jnp.asarray(made["pooled"]))
    rope, length = _rope(T, H, W, L, CONFIG.rope_axes, CONFIG.theta), jnp.full(len(made["t"]), N + L)
    for i in range(2):
        block = _layer(DoubleBlock, params["double_blocks"], i)
        out = dict(zip(("video", "text"), block(video, text, condition, rope, length, attend), strict=True))
        for kind, value in out.items():
            errors[f"double.{i}.{kind}"] = relative(value, found[f"{case}double.{i}.{kind}"])
        video, text = (jnp.asarray(found[f"{case}double.{i}.{kind}"]) for kind in ("video", "text"))
    for i in range(2):
        block = _layer(SingleBlock, params["single_blocks"], i)
        (joint,) = block(jnp.concatenate([video, text], axis=1), condition, rope, length, attend)
        for kind, value in (("video", joint[:, :N]), ("text", joint[:, N:])):
            errors[f"single.{i}.{kind}"] = relative(value, found[f"{case}single.{i}.{kind}"])
        video, text = (jnp.asarray(found[f"{case}single.{i}.{kind}"]) for kind in ("video", "text"))
    return errors


def _merged(params: functional.Params):
    graph, state = functional._structure(CONFIG)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return graph, state


def _layer(kind: type, stack: functional.Params, layer: int) -> nnx.Module:
    graph, state = nnx.split(kind(CONFIG, nnx.Rngs(0)), nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda leaf: leaf[layer], stack))
    return nnx.merge(graph, state)


def relative(value, expected) -> float:
    return float(np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected))


def converted(folder: Path) -> float:
    """Our export in FLUX.1's own names, by diffusers' converter, against our export in theirs: the largest difference.

    Of one block of each kind, as wide as the published ones, which the converter takes for granted.
    """
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
    from safetensors.torch import load_file

    config = DiTConfig(**{**CONFIG.__dict__, "hidden": 3072, "heads": 24, "double_blocks": 1, "single_blocks": 1})
    rng, flat = np.random.default_rng(0), functional.to_names(functional.abstract(config))
    drawn = {n: rng.integers(0, 2**14, leaf.shape, np.uint16).view(jnp.bfloat16) for n, leaf in flat.items()}
    safetensors.numpy.save_file(drawn, folder / "ours.safetensors")
    for layout in ("bfl", "diffusers"):
        export = folder / f"{layout}.safetensors"
        convert.export_network(Tensors(folder / "ours.safetensors"), config, layout, export, lambda: None)
    made = convert_flux_transformer_checkpoint_to_diffusers(load_file(folder / "bfl.safetensors"))
    expected = load_file(folder / "diffusers.safetensors")
    assert made.keys() == expected.keys(), made.keys() ^ expected.keys()
    return max(float((made[name] - expected[name]).abs().max()) for name in expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the fixture")
    flags = parser.parse_args()
    found = theirs()
    if flags.write:
        safetensors.numpy.save_file(found, FIXTURE)
        print(f"wrote {FIXTURE.name}: {FIXTURE.stat().st_size / 1e3:.0f} kB")
    folder = Path(tempfile.mkdtemp())
    weights = {name.removeprefix("weights/"): v for name, v in found.items() if name.startswith("weights/")}
    params = parameters(weights, folder)
    print(f"{'module':<24} {'shape':<22} {'dtype':<10} relative error")
    for name, error in blocks(params, found).items():
        print(f"{name:<24} {found['video/float32/' + name].shape!s:<22} {'float32':<10} {error:.1e}")
    for case in CASES:
        for dtype in DTYPES:
            expected = found[f"{case}/{dtype}/out"]
            error = relative(ours(params, case, dtype), expected)
            print(f"{'whole: ' + case:<24} {expected.shape!s:<22} {dtype:<10} {error:.1e}")
    print(f"bfl export through diffusers' converter, 3072 wide: largest difference {converted(folder):g}")


if __name__ == "__main__":
    main()
