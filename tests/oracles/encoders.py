"""T5, CLIP and DINOv2 of transformers (PyTorch, tiny, random) beside ours.

python -m tests.oracles.encoders            prints relative errors; needs torch and transformers
python -m tests.oracles.encoders --write    writes tests/encoders/published/, which the tests read without them

tests/encoders/published/NAME/ is a folder as Hugging Face publishes one (config.json, model.safetensors), with what the
oracle makes of the inputs in expected.safetensors.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from paris_jax.encoders import clip, dinov2, hunyuan, t5

FOLDER = Path(__file__).parents[1] / "encoders" / "published"
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": 4}
TEXTS = [
    "a large red circle moving right fast on a white ground",
    "Don't  stop: 3 Tigers' cubs, naïve as ever!",
    "a striped ball",
]
MERGES = [
    "a r",
    "r e",
    "re d</w>",
    "l ar",
    "lar g",
    "larg e</w>",
    "c i",
    "ci r",
    "cir c",
    "l e</w>",
    "circ le</w>",
    "t h",
]
CLIP_END = 2 * 256 + len(MERGES) + 1  # the id of <|endoftext|>
NAMES = ("t5", "clip", "clip-text", "dinov2", "dinov2-giant", "hunyuan")
VAE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}


def inputs(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    ids = rng.integers(5, 45, (2, 21)).astype(np.int32)
    if name == "t5":
        return {"ids": ids, "length": np.array([21, 9], np.int32)}
    made: dict[str, np.ndarray] = {}
    if name == "hunyuan":
        made["video"] = rng.uniform(-1, 1, (2, 9, 24, 16, 3)).astype(np.float32)
        made |= {"image": made["video"][:1, :1], "latent": rng.standard_normal((1, 3, 2, 3, 4), np.float32)}
    elif name.startswith("clip"):
        ids[0, 11], ids[0, 12:], ids[1, -1] = CLIP_END, 1, CLIP_END  # each ends with the end token; the first is padded
        made |= {"ids": ids, "image": rng.random((2, 12, 12, 3), np.float32)}
    else:
        sizes = {"square": (12, 12), "wide": (8, 20), "large": (28, 24)}
        made |= {f"image-{k}": rng.random((2, *size, 3), np.float32) for k, size in sizes.items()}
    return made


def theirs(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The oracle's network, its config, and what it makes of the inputs."""
    import torch
    import transformers as hf

    torch.manual_seed(len(name))
    made = {k: torch.tensor(v) for k, v in inputs(name).items()}
    if name == "t5":
        model: Any = hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu"))
    elif name.startswith("clip"):
        text = {**TOWER, "vocab_size": CLIP_END + 1, "max_position_embeddings": 24}
        text |= {"bos_token_id": CLIP_END - 1, "eos_token_id": CLIP_END}
        vision = {**TOWER, "image_size": 12, "patch_size": 4, "hidden_size": 48}
        both = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        model = hf.CLIPModel(both) if name == "clip" else hf.CLIPTextModel(hf.CLIPTextConfig(**text))
    elif name == "hunyuan":
        import diffusers

        model = diffusers.AutoencoderKLHunyuanVideo(**VAE)
    else:
        model = hf.Dinov2Model(hf.Dinov2Config(**DINO, image_size=12, use_swiglu_ffn=name.endswith("giant")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3 if name != "hunyuan" or parameter.ndim < 5 else 0.06)
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model.eval()
    with torch.no_grad():
        return model, {k: np.ascontiguousarray(v.numpy()) for k, v in _ask(name, model, made).items()}


def _ask(name: str, model: Any, made: dict[str, Any]) -> dict[str, Any]:
    import torch

    if name == "t5":
        mask = torch.arange(made["ids"].shape[1]) < made["length"][:, None]
        return {"hidden": model(input_ids=made["ids"].long(), attention_mask=mask).last_hidden_state}
    if name == "hunyuan":
        last = lambda x: x.permute(0, 2, 3, 4, 1)  # noqa: E731
        ask = {k: v.permute(0, 4, 1, 2, 3) for k, v in made.items()}
        found = {k: last(model.encode(ask[k]).latent_dist.mode()) for k in ("video", "image")}
        return found | {"latent": last(model.decode(ask["latent"]).sample)}
    if name == "clip-text":
        out = model(input_ids=made["ids"].long())
        return {"hidden": out.last_hidden_state, "pooled": out.pooler_output}
    if name == "clip":
        seen = _coloured(made["image"], clip.COLOURS)
        text, image = model.text_model(input_ids=made["ids"].long()), model.vision_model(pixel_values=seen)
        found = {"hidden": text.last_hidden_state, "pooled": text.pooler_output, "image-pooled": image.pooler_output}
        projected = {"embedding": model.text_projection(text.pooler_output)}
        return found | projected | {"image-embedding": model.visual_projection(image.pooler_output)}
    return {k: model(pixel_values=_coloured(v, dinov2.COLOURS)).last_hidden_state for k, v in made.items()}


def _coloured(image: Any, colours: Any) -> Any:
    import torch

    mean, spread = (torch.tensor(each).reshape(1, 3, 1, 1) for each in colours)
    return (image.permute(0, 3, 1, 2) - mean) / spread


def write(name: str) -> None:
    model, expected = theirs(name)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: np.asarray(v.float().numpy(), jnp.bfloat16) for k, v in model.state_dict().items() if v.is_floating_point()
    }
    if name == "t5":
        weights.pop("encoder.embed_tokens.weight", None)  # `shared` again, as the files leave it out
    if name.startswith("dinov2"):
        weights = _published(weights)
    if name == "clip":  # as its published file has it, and nobody needs it
        weights["text_model.embeddings.position_ids"] = np.arange(24)[None]
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    described = dict(model.config) if name == "hunyuan" else json.loads(model.config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(_plain(described), indent=1, sort_keys=True) + "\n")
    (folder / "expected").mkdir(exist_ok=True)
    if name in ("t5", "clip"):
        ids = _tokenizers(name, folder)
        (folder / "expected" / "ids.json").write_text(json.dumps(dict(zip(TEXTS, ids, strict=True)), indent=1) + "\n")
    safetensors.numpy.save_file(expected, folder / "expected" / "outputs.safetensors")


def _tokenizers(name: str, folder: Path) -> list[list[int]]:
    """Writes a tiny tokenizer of each kind into the folder, and returns what the oracle's makes of TEXTS."""
    import transformers as hf

    if name == "t5":
        import sentencepiece

        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join([*TEXTS, "small blue squares and green triangles drift up and down slowly"] * 20))
        kinds = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=T5["vocab_size"], **kinds
        )
        corpus.unlink()
        (folder / "spiece.vocab").unlink()
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        return [[*pieces.encode(text), 1] for text in TEXTS]
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in MERGES)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    theirs = hf.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return [theirs(text)["input_ids"] for text in TEXTS]


def _published(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv2's tensors by the names in its published files, which transformers 5 has changed."""
    renamed = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"))
    found = {}
    for name, value in weights.items():
        for new, old in (*renamed, ("o_proj", "output.dense")):
            name = name.replace(f"attention.{new}", f"attention.{old}")
        if ".mlp.gate_proj." in name:  # with `up`, one matrix
            value = np.concatenate([value, weights[name.replace("gate_proj", "up_proj")]])
        if ".mlp.up_proj." not in name:
            found[name.replace("gate_proj", "weights_in").replace("down_proj", "weights_out")] = value
    return found


def _plain(described: Any) -> Any:
    """What a config says of the network: numbers, names of kinds, and the configs within."""
    keep = ("hidden_act", "feed_forward_proj", "model_type", "text_config", "vision_config")
    return {
        k: _plain(v) if isinstance(v, dict) else v
        for k, v in described.items()
        if k in keep or (isinstance(v, int | float) and not isinstance(v, bool))
    }


def whole(params: Any) -> Any:
    """Weights of an encoder, all of them read."""
    return jax.tree.map(lambda later: later.read(np.float32), params)


def ours(name: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Our encoder, read from the folder, on the inputs."""
    made = inputs(name)
    read: Callable[..., Any] = {"t5": t5.read, "clip": clip.read, "dinov2": dinov2.read, "hunyuan": hunyuan.read}[
        name.split("-")[0]
    ]
    config, params = read(FOLDER / name)
    params = whole(params)
    if name == "t5":
        return {"hidden": np.asarray(t5.encode(config, params, made["ids"], made["length"], dtype))}
    if name == "hunyuan":
        found = {
            k: hunyuan.encode(config, params, made[k], dtype)[..., : VAE["latent_channels"]] for k in ("video", "image")
        }
        found |= {"latent": hunyuan.decode(config, params, made["latent"], dtype)}
        return {k: np.asarray(v) for k, v in found.items()}
    if name.startswith("clip"):
        found = clip.encode_text(config, params, made["ids"], dtype)
        if name == "clip":
            found |= {f"image-{k}": v for k, v in clip.encode_image(config, params, made["image"], dtype).items()}
        return {k: np.asarray(v) for k, v in found.items()}
    return {k: np.asarray(dinov2.encode(config, params, image, dtype)) for k, image in made.items()}


def errors(name: str, expected: dict[str, np.ndarray], dtype: str = "float32") -> dict[str, float]:
    """Relative error of each output; T5's behind a text's end, which nobody reads, is left out."""
    found, errors = ours(name, dtype), {}
    for key, value in expected.items():
        given = found[key]
        if name == "t5":
            there = np.arange(given.shape[1]) < inputs(name)["length"][:, None]
            given, value = given[there], value[there]
        errors[key] = float(np.linalg.norm(given.astype(np.float64) - value) / np.linalg.norm(value))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the fixtures")
    flags = parser.parse_args()
    print(f"{'encoder':<14} {'output':<18} {'shape':<16} {'dtype':<9} relative error")
    for name in NAMES:
        if flags.write:
            write(name)
        _, expected = theirs(name)
        for dtype in ("float32", "bfloat16"):
            for key, error in errors(name, expected, dtype).items():
                print(f"{name:<14} {key:<18} {expected[key].shape!s:<16} {dtype:<9} {error:.1e}")


if __name__ == "__main__":
    main()
