"""Schemas of all JSON files of a run folder and of exported networks: fields, types and ranges, checked on reading.

A manifest is decoded into one of these structures, never into nested dictionaries. Fields that a schema does not have
are ignored in manifests, and refused inside descriptions (codec, text encoder, network), which decide what is computed.
"""

import math
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=10_000)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
OptionalSha256 = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
ConfigHash = Annotated[str, Meta(max_length=200)]  # "": no config of this project made it
FileName = Annotated[str, Meta(min_length=1, max_length=1000)]  # checked by `safe_files.inside` where it is used
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Size = Annotated[int, Meta(ge=1, le=1 << 16)]  # of an axis
Features = Annotated[int, Meta(ge=0, le=4096)]
Blocks = Annotated[int, Meta(ge=0, le=1024)]
Cluster = Annotated[int, Meta(ge=0, lt=1024)]
NumClusters = Annotated[int, Meta(ge=1, le=1024)]
Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]
Spread = Annotated[float, Meta(ge=1e-6, le=1e6)]
FramesPerSecond = Annotated[float, Meta(gt=0, le=1000)]
Shift = Annotated[float, Meta(ge=0, le=1000)]
Dtype = Literal["float32", "bfloat16", "float16"]
LATENT_VALUES = 1 << 28  # of a clip's latent, at most; one of 768 x 768 pixels and 129 frames has 5 million
CLAIM_TOLERANCE = 0.02  # the largest that a claimed loss may state: of itself; other devices and dtypes stay below
ClusterKey = Annotated[str, Meta(pattern="^(0|[1-9][0-9]{0,3})$")]


class PixelsDescription(Struct, tag_field="name", tag="pixels", frozen=True, forbid_unknown_fields=True):
    """The codec `pixels`."""

    time: Size
    height: Size
    width: Size


class HunyuanDescription(Struct, tag_field="name", tag="hunyuan", frozen=True, forbid_unknown_fields=True):
    """The codec `hunyuan`; `sha256` of its weights, "" where they were not known."""

    time: Size = 4
    height: Size = 8
    width: Size = 8
    sha256: OptionalSha256 = ""
    posterior: Literal["mean", "sample"] = "mean"


class WordsDescription(Struct, tag_field="name", tag="words", frozen=True, forbid_unknown_fields=True):
    """The text encoder `words`."""

    vocabulary: Annotated[tuple[Name, ...], Meta(max_length=1_000_000)]
    width: Size
    max_tokens: Size


class MiniLMDescription(Struct, tag_field="name", tag="minilm", frozen=True, forbid_unknown_fields=True):
    """The text encoder `minilm`."""

    max_tokens: Size
    weights: OptionalSha256 = ""


class T5ClipDescription(
    Struct, tag_field="name", tag="t5+clip", frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The text encoder `t5+clip`; hashes of its weights by encoder, {} where they were not known."""

    max_tokens: Size
    width: Size
    pooled_width: Size
    weights: dict[str, Sha256]
    pad_to_max_tokens: bool = False
    suffix: Annotated[str, Meta(max_length=1000)] = ""


def name_of(description: Struct) -> str:
    """The name by which configs and manifests choose a codec or text encoder."""
    return str(description.__struct_config__.tag)


CodecDescription = PixelsDescription | HunyuanDescription
TextDescription = WordsDescription | MiniLMDescription | T5ClipDescription


class Latent(Struct, frozen=True, forbid_unknown_fields=True):
    """Latents of a data set: shape (T, H, W, C), and mean and spread, one for all channels or one for each."""

    shape: tuple[Size, Size, Size, Size]
    mean: tuple[Mean, ...]
    spread: tuple[Spread, ...]

    def __post_init__(self):
        if not len(self.mean) == len(self.spread) or len(self.mean) not in (1, self.shape[-1]):
            raise ValueError(f"mean and spread must have 1 or {self.shape[-1]} values each, one for each channel")
        if math.prod(self.shape) > LATENT_VALUES:
            raise ValueError(f"shape has more than {LATENT_VALUES:,} values")


class _Network(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Sizes that both kinds of networks have; see `models.dit.DiTConfig`."""

    channels: Size
    pooled_width: Size
    hidden: Size
    heads: Annotated[int, Meta(ge=1, le=1024)]
    rope_axes: tuple[Features, Features, Features]
    mlp_ratio: Annotated[int, Meta(ge=1, le=64)] = 4
    theta: Annotated[float, Meta(ge=1, le=1e12)] = 1e4
    dtype: Dtype = "float32"
    cond_frames: bool = False
    attention: Literal["joint", "factorised"] = "joint"

    def __post_init__(self):
        width, rest = divmod(self.hidden, self.heads)
        if rest or sum(self.rope_axes) != width or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(
                f"hidden, heads, rope_axes = {self.hidden}, {self.heads}, {self.rope_axes} do not fit: "
                "rope_axes must be even and add up to hidden / heads"
            )


class DiTDescription(_Network, tag_field="kind", tag="dit", frozen=True, forbid_unknown_fields=True, kw_only=True):
    text_width: Size
    double_blocks: Blocks
    single_blocks: Blocks
    prediction_type: Name = "velocity"


class RouterDescription(
    _Network, tag_field="kind", tag="router", frozen=True, forbid_unknown_fields=True, kw_only=True
):
    clusters: NumClusters
    blocks: Blocks


class FileEntry(Struct, frozen=True):
    """Size and hash of a file."""

    bytes: Bytes
    sha256: Sha256


class Conventions(Struct, frozen=True, omit_defaults=True):
    """Time, path and prediction of a network (docs/design.md), as sentences."""

    time: Text = ""
    path: Text = ""
    prediction: Text = ""


class Manifest(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Entries of every manifest.

    Attributes:
      schema: `manifest.SCHEMA`.
      config_hash: hash of the config that made the folder; "" where none did.
      files: every file of the folder, relative to it.
      versions: of the packages that made it.
    """

    schema: str
    config_hash: ConfigHash
    files: dict[FileName, FileEntry]
    versions: dict[str, Text] = field(default_factory=dict)
    conventions: Conventions = Conventions()


class LatentSpaceManifest(Manifest, frozen=True, kw_only=True):
    """Everything that networks of one ensemble share: latents, codec, text encoder.

    Attributes:
      text_length: tokens of the longest caption.
      fps: frames per second of the videos.
    """

    latent: Latent
    codec: CodecDescription
    text: TextDescription
    text_length: Size
    fps: FramesPerSecond

    def __post_init__(self):
        if self.text_length > self.text.max_tokens:
            raise ValueError(
                f"text_length is {self.text_length}, more than the {self.text.max_tokens} tokens of the text encoder"
            )


class DroppedCount(Struct, frozen=True):
    """How many clips and files were not used at a stage for one reason."""

    stage: Name
    reason: Name
    count: Count


class RecordsManifest(LatentSpaceManifest, frozen=True, kw_only=True):
    """A folder of records (`data.records`).

    Attributes:
      features: name and weights of the encoder of the clustered features.
      source: where the clips come from.
      clips: their number.
      cond_images: whether records hold the first and last frame encoded as images.
      partition: identity of the partition, in folders that `cluster` wrote.
    """

    features: dict[str, Any]
    source: dict[str, Any]
    clips: Count
    cond_images: bool = False
    partition: OptionalSha256 = ""


class DataManifest(RecordsManifest, frozen=True, kw_only=True, tag="data"):
    """RUN/data.

    Attributes:
      dropped: unused clips by reason, the commonest first; dropped.jsonl lists them.
    """

    dropped: tuple[DroppedCount, ...] = ()


class ClusterManifest(RecordsManifest, frozen=True, kw_only=True, tag="cluster"):
    """RUN/partition/clusters/K."""

    cluster: Cluster


class HeldoutManifest(RecordsManifest, frozen=True, kw_only=True, tag="heldout"):
    """RUN/partition/validation or test; `sizes` by cluster."""

    split: Literal["validation", "test"] = "test"
    sizes: tuple[Count, ...]


class PartitionManifest(Manifest, frozen=True, kw_only=True, tag="partition"):
    """RUN/partition.

    Attributes:
      sizes: training clips by cluster.
      validation, test: numbers of held-out clips.
      data: `manifest.contents_hash` of the clips.
      features: encoder of the features, as in the manifest of the data; {} where it was not written.
      assigned_from: hash of the centroids of another partition that the clips were assigned with; "" for clusters of
        their own.
    """

    clusters: NumClusters
    sizes: tuple[Count, ...]
    validation: Count
    test: Count
    data: OptionalSha256 = ""
    features: dict[str, Any] = field(default_factory=dict)
    assigned_from: OptionalSha256 = ""


class TrainingDescription(Struct, frozen=True, omit_defaults=True):
    """How a network was trained; `init_from`: hashes of the files of its initial weights; `ema_decay` at the end."""

    steps: Count
    global_batch_size: Count
    clips: Count
    flops_per_sample: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)]
    init_from: dict[FileName, Sha256] | None = None
    ema_decay: Annotated[float, Meta(ge=0, le=1)] | None = None


class CodeVersion(Struct, frozen=True):
    """The code that wrote a folder: its version and, in a checkout, revision and whether that was changed."""

    version: Text = ""
    revision: Annotated[str, Meta(pattern="^([0-9a-f]{40}|[0-9a-f]{64})?$")] = ""
    dirty: bool = False


class HeldoutClaim(Struct, frozen=True):
    """A loss on held-out clips, as its trainer measured it on a fixed probe of them (`training.claims`).

    Attributes:
      loss: mean over all points.
      split, data: which clips, and `manifest.contents_hash` of their folder.
      clips, timesteps, seed: of the probe.
      law: of the timesteps; "uniform_bins": uniform in equal bins of [0, 1], one in each.
      tolerance: relative, within which the loss must be found again.
    """

    loss: Annotated[float, Meta(ge=0, le=1e6)]
    split: Literal["validation", "test"]
    data: Sha256
    clips: Annotated[int, Meta(ge=1, le=4096)]
    timesteps: Annotated[int, Meta(ge=1, le=64)]
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)]
    law: Literal["uniform_bins"] = "uniform_bins"
    tolerance: Annotated[float, Meta(gt=0, le=CLAIM_TOLERANCE)] = CLAIM_TOLERANCE


class NetworkManifest(LatentSpaceManifest, frozen=True, kw_only=True, tag="network"):
    """An exported network (`artifacts.exported`).

    Attributes:
      cluster: of an expert; None for the other roles.
      clusters: of the partition.
      timestep_shift: a constant factor; 0 for Open-Sora 2.0's rule from the size of the latent.
      parameters: their number; 0 where it was not written.
      sampling: default sampling settings (`config.sampling.SamplingSettings`).
      training: None for a network that was imported.
      partition: identity of the partition; "" where it is not known.
      data: hash of the clips that it was trained on (`manifest.contents_hash` of each folder); "" where not known.
      tree: `exported.tree_hash` of its parameters; "" where it was not written.
      experiment: the resolved config, of paths only their last names; {} where it was not written.
      code: version of paris_jax that trained it.
      heldout: the loss that its trainer claims; None where none was recorded.
      source, report, origin: of imported weights.
    """

    network: DiTDescription | RouterDescription
    role: Literal["expert", "monolith", "router"]
    cluster: Cluster | None
    clusters: NumClusters
    timestep_shift: Shift
    parameters: Count = 0
    dtype: Dtype = "float32"
    sampling: dict[str, Any] = field(default_factory=dict)
    training: TrainingDescription | None = None
    partition: OptionalSha256 = ""
    data: OptionalSha256 = ""
    tree: OptionalSha256 = ""
    experiment: dict[str, Any] = field(default_factory=dict)
    code: CodeVersion = CodeVersion()
    heldout: HeldoutClaim | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.latent.shape[1] % 2 or self.latent.shape[2] % 2:
            raise ValueError("latent.shape must have an even number of rows and columns")


class WeightsManifest(Manifest, frozen=True, kw_only=True, tag="weights"):
    """Imported weights to start training from."""

    network: DiTDescription
    source: Name
    report: dict[str, Any]


class NetworkEntry(Struct, frozen=True):
    """A network that an ensemble names: its folder, and the hash of its manifest."""

    path: FileName
    manifest_sha256: Sha256


class EnsembleManifest(Manifest, frozen=True, kw_only=True, tag="ensemble"):
    """An ensemble; experts by cluster."""

    experts: Annotated[dict[ClusterKey, NetworkEntry], Meta(min_length=1, max_length=1024)]
    router: NetworkEntry
    sampling: dict[str, Any]
    clusters: NumClusters
    provenance: dict[str, Any] | None = None

    def __post_init__(self):
        folders = [entry.path for entry in (*self.experts.values(), self.router)]
        if len(set(folders)) != len(folders):
            raise ValueError("experts and router must have a folder each")
        beyond = [k for k in self.experts if int(k) >= self.clusters]
        if beyond:
            raise ValueError(f"experts has cluster {beyond[0]}; there are {self.clusters}")


class EvaluationManifest(Manifest, frozen=True, kw_only=True, tag="evaluation"):
    """RUN/evaluation."""

    evaluation_hash: Sha256


class ShardStatistics(Struct, frozen=True):
    """Sums over the clips of a shard; of their latents, `sum` and `squares` by channel over `numbers` values each."""

    clips: Count
    text_length: Annotated[int, Meta(ge=0, le=1 << 16)]
    words: tuple[Name, ...]
    numbers: Count
    sum: float | tuple[float, ...]
    squares: float | tuple[float, ...]
    shape: tuple[Size, ...]


class DroppedItem(Struct, frozen=True):
    """A line of dropped.jsonl: a clip or file that was not used."""

    id: Text
    stage: Name
    reason: Name
    detail: str = ""


class SourceItem(Struct, frozen=True, omit_defaults=True):
    """The state of an item of a source when its clips were prepared.

    Attributes:
      id: of the item in its source.
      state: size and time of change, which are compared first.
      caption: hash of its caption; "" where it is part of the contents.
      content: hash of its contents; "" where it was not read.
    """

    id: Text
    state: Text = ""
    caption: Annotated[str, Meta(max_length=64)] = ""
    content: Annotated[str, Meta(max_length=64)] = ""


class ShardMarker(Struct, frozen=True):
    """The marker of a finished shard: its items, statistics, and dropped clips.

    Attributes:
      limits: seconds and megabytes for each clip, where some clips were dropped because of them.
      files: sizes and hashes of the shard's files, so that nobody has to read them again for the manifest.
      items: of the source, as they were; empty for clips that are computed.
      hashes: perceptual hashes of the clips, where near duplicates are dropped.
    """

    origin: dict[str, Any]
    tally: ShardStatistics
    dropped: tuple[DroppedItem, ...] = ()
    limits: tuple[float, int] | None = None
    files: dict[FileName, FileEntry] = field(default_factory=dict)
    items: tuple[SourceItem, ...] = ()
    hashes: tuple[Annotated[str, Meta(pattern="^[0-9a-f]{48}$")], ...] = ()


class TensorsIndex(Struct, frozen=True):
    """The index of a network in several safetensors files: the file of each tensor, and `total_size` in bytes."""

    weight_map: Annotated[dict[str, FileName], Meta(min_length=1)]
    metadata: dict[str, Any] | None = None


class TensorEntry(Struct, frozen=True):
    """A tensor in the header of a safetensors file; offsets count from the end of the header."""

    dtype: Annotated[str, Meta(max_length=20)]
    shape: Annotated[tuple[Bytes, ...], Meta(max_length=16)]
    data_offsets: tuple[Bytes, Bytes]


class SignatureFile(Struct, frozen=True):
    """manifest.sig: an Ed25519 signature and the key that it can be checked with (`artifacts.signatures`)."""

    algorithm: Literal["ed25519"]
    public_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    signature: Annotated[str, Meta(pattern="^[0-9a-f]{128}$")]


class SharedData(Struct, frozen=True):
    """RUN/data.json: prepared clips of another run folder, and the hash of their manifest."""

    path: Text
    manifest_sha256: Sha256


class StoredConfig(Struct, frozen=True):
    """RUN/config.json."""

    schema: str
    hash: ConfigHash
    config: dict[str, Any]
