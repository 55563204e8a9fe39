"""Tone-maps HDR video (PQ and HLG, ITU-R BT.2100) to SDR (BT.709, shown with BT.1886)."""

import numpy as np

WHITE = 203.0  # cd/m2 of diffuse white in HDR (ITU-R BT.2408), which becomes SDR's white
HLG_PEAK = 1000.0  # cd/m2 of the screen that HLG is graded on
KNEE = 0.6  # linear levels of SDR up to here are kept, brighter ones are compressed below 1
# BT.2020's primaries in those of BT.709 (ITU-R BT.2087).
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)


def to_sdr(image: np.ndarray, transfer: str) -> np.ndarray:
    """Converts (H, W, 3) uint16 in BT.2020's primaries, transfer "PQ" or "HLG", to (H, W, 3) uint8."""
    signal = image.astype(np.float32) / 65535
    light = {"PQ": pq, "HLG": hlg}[transfer](signal) / WHITE
    light = np.maximum(light @ TO_709.T, 0)
    brightest = light.max(-1, keepdims=True)
    over = np.maximum(brightest - KNEE, 0)
    compressed = np.where(brightest > KNEE, KNEE + (1 - KNEE) * (1 - np.exp(-over / (1 - KNEE))), brightest)
    light = light * compressed / np.maximum(brightest, 1e-6)  # of all three alike, which keeps the hue
    return np.round(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)


def pq(signal: np.ndarray) -> np.ndarray:
    """cd/m2 of a PQ signal in [0, 1] (SMPTE ST 2084)."""
    root = signal ** np.float32(32 / 2523)
    ratio = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
    return 10000 * ratio ** np.float32(8192 / 1305)


def hlg(signal: np.ndarray) -> np.ndarray:
    """cd/m2 of an HLG signal in [0, 1] on a screen of HLG_PEAK (ITU-R BT.2100, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = (scene @ LUMINANCE)[..., None]
    return HLG_PEAK * scene * np.maximum(luminance, 1e-6) ** np.float32(0.2)
