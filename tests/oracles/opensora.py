"""Open-Sora 2.0's network written down again in NumPy, float64, by its own names: an oracle for the layout `opensora2`.

It rotates the halves of a head where ours rotates neighbours, keeps q, k, v apart, puts the text before the video, and
reads the frames that are given (arXiv 2503.09642, section 3).
"""

import math

import numpy as np


def velocity(weights: dict[str, np.ndarray], x, t, text, pooled, kept, *, heads: int, axes, theta: float = 1e4):
    """The velocity of one sample: x (T, H, W, C), t a number, text (L, X), pooled (P,), kept (T, H, W, 1 + C)."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embed(name, value):
        return linear(f"{name}.out_layer", _silu(linear(f"{name}.in_layer", value)))

    def modulation(name, count):
        return np.split(linear(name, _silu(vec)), count)

    def heads_of(name, value):
        return value.reshape(len(value), heads, -1)

    def rotated(name, value):
        value = value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.scale"]
        first, second = np.split(value, 2, -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def attend(q, k, v):
        logits = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("hnm,mhd->nhd", weight / weight.sum(-1, keepdims=True), v).reshape(len(q), -1)

    T, H, W, _ = x.shape
    angles = 1000 * t * np.exp(-math.log(10000) * np.arange(128) / 128)
    vec = embed("time_in", np.concatenate([np.cos(angles), np.sin(angles)])) + embed("vector_in", pooled)
    video = linear("img_in", _pack(x)) + linear("cond_in", _pack(kept))
    words = linear("txt_in", text)
    places = np.indices((T, H // 2, W // 2)).reshape(3, -1).T
    places = np.concatenate([np.zeros((len(words), 3)), places])
    turns = [places[:, i, None] * theta ** (-np.arange(0, n, 2) / n) for i, n in enumerate(axes)]
    cos, sin = (f(np.concatenate(turns, -1))[:, None] for f in (np.cos, np.sin))

    L = len(words)
    for i in range(_blocks(w, "double_blocks")):
        streams, q, k, v = {"txt": words, "img": video}, [], [], []
        mods = {s: modulation(f"double_blocks.{i}.{s}_mod.lin", 6) for s in streams}
        for s, value in streams.items():
            name, (shift, scale, *_) = f"double_blocks.{i}.{s}_attn", mods[s]
            value = (1 + scale) * _norm(value) + shift
            for part, found in zip("qkv", (q, k, v), strict=True):
                found.append(heads_of(s, linear(f"{name}.{part}_proj", value)))
        rows = {"txt": slice(0, L), "img": slice(L, None)}
        allcos, allsin = cos, sin
        for s, r in rows.items():
            cos, sin, at = allcos[r], allsin[r], list(rows).index(s)
            q[at] = rotated(f"double_blocks.{i}.{s}_attn.norm.query_norm", q[at])
            k[at] = rotated(f"double_blocks.{i}.{s}_attn.norm.key_norm", k[at])
        cos, sin = allcos, allsin
        seen = attend(*(np.concatenate(pair) for pair in (q, k, v)))
        for s in streams:
            name, (_, _, gate, shift, scale, gate_mlp) = f"double_blocks.{i}.{s}", mods[s]
            streams[s] = streams[s] + gate * linear(f"{name}_attn.proj", seen[rows[s]])
            hidden = _gelu(linear(f"{name}_mlp.0", (1 + scale) * _norm(streams[s]) + shift))
            streams[s] = streams[s] + gate_mlp * linear(f"{name}_mlp.2", hidden)
        words, video = streams["txt"], streams["img"]

    joint = np.concatenate([words, video])
    for i in range(_blocks(w, "single_blocks")):
        name = f"single_blocks.{i}"
        shift, scale, gate = modulation(f"{name}.modulation.lin", 3)
        value = (1 + scale) * _norm(joint) + shift
        q, k = (heads_of(name, linear(f"{name}.{part}_proj", value)) for part in "qk")
        v, hidden = np.split(linear(f"{name}.v_mlp", value), [joint.shape[1]], -1)
        q, k = rotated(f"{name}.norm.query_norm", q), rotated(f"{name}.norm.key_norm", k)
        seen = attend(q, k, heads_of(name, v))
        joint = joint + gate * linear(f"{name}.linear2", np.concatenate([seen, _gelu(hidden)], -1))

    shift, scale = modulation("final_layer.adaLN_modulation.1", 2)
    out = linear("final_layer.linear", (1 + scale) * _norm(joint[L:]) + shift)
    return out.reshape(T, H // 2, W // 2, -1, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(T, H, W, -1)


def _pack(x):
    T, H, W, C = x.shape
    return x.reshape(T, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 5, 2, 4).reshape(T * H * W // 4, 4 * C)


def _blocks(weights, prefix):
    return len({name.split(".")[1] for name in weights if name.startswith(prefix)})


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
