"""Top-k by guidance on a finished ensemble: --workdir names its run, and nothing is trained."""


def sweep(add):
    for top_k in (1, 2, 3):
        for scale in (1.0, 2.0, 3.0):
            add(sampling__routing="top_k", sampling__top_k=top_k, sampling__guidance_scale=scale)
