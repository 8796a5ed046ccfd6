"""Options of images, labels, features and clusters: DATA, EXTRACT_FEATURES, CLUSTERFIT."""

from __future__ import annotations

from typing import Any, Literal

from vissl_like.config.section import Section, group, option


class LimitSampling(Section):
    SEED: int = option(0, "Seed of the subset that DATA_LIMIT draws.", ge=0)
    IS_BALANCED: bool = option(
        False,
        "Draw the same number of each class (what is left over from the first ones); needs labels and DATA_LIMIT >= classes.",
    )
    SKIP_NUM_SAMPLES: int = option(0, "Leave out this many samples of the drawn order first (disjoint subsets).", ge=0)


class Split(Section):
    DATASET_NAMES: list[str] = option([], "Name of each source: a catalog entry, a torchvision data set, or free text.")
    DATA_SOURCES: list[str] = option([], "Kind of each source (`list data_sources`). Empty: the split is not used.")
    DATA_PATHS: list[str] = option(
        [], "Folder, .npy file list, or shards (folder, pattern, URLs) of each source. Empty: looked up in the catalog."
    )
    LABEL_SOURCES: list[str] = option(
        [], "Where labels come from: disk_folder, disk_filelist or the data source's name."
    )
    LABEL_PATHS: list[str | list[str]] = option(
        [],
        "A .npy label file per source (or a list of them: multi-label); tied to images by the _images.npy beside it.",
    )
    LABEL_TYPE: Literal["standard", "sample_index", "zero"] = option(
        "standard",
        "Labels where neither LABEL_SOURCES nor LABEL_PATHS says where they come from. standard: the source's own, such as "
        "its sub-folders; sample_index: the row; zero: no labels.",
    )
    LABEL_ALIGNMENT: Literal["path", "position"] = option(
        "path", "path: labels must name their images; position: a bare label file of equal length is taken row by row."
    )
    BATCHSIZE_PER_REPLICA: int = option(32, "Images per process and forward pass.", ge=1)
    TRANSFORMS: list[dict[str, Any]] = option([], "Transforms in order: `name` and its arguments (`list transforms`).")
    COLLATE_FUNCTION: Literal["default_collate"] = option("default_collate", "How samples become a batch.")
    COLLATE_FUNCTION_PARAMS: dict[str, Any] = option({}, "Arguments of the collate function.")
    DROP_LAST: bool = option(False, "Leave out the last, smaller batch of each training epoch.")
    MMAP_MODE: bool = option(True, "Map .npy file lists and labels instead of reading them.")
    DATA_LIMIT: int = option(-1, "Use only this many samples; -1: all.", ge=-1)
    DATA_LIMIT_SAMPLING: LimitSampling = group(LimitSampling, "How DATA_LIMIT chooses.")
    REMOVE_IMG_PATH_PREFIX: str = option("", "Prefix taken off the paths of a file list.")
    NEW_IMG_PATH_PREFIX: str = option("", "Prefix put before the paths of a file list.")
    USE_SPLIT: Literal["", "TRAIN", "VAL", "TEST"] = option(
        "", "Part of the data set that stands here, such as VAL for a test on validation images; empty: its own."
    )
    IMAGE_SUB_PATH: str = option("", "Annotated data sets: folder of the images. Empty: the data set's own.")
    MASK_SUB_PATH: str = option("", "Annotated data sets: folder of the masks. Empty: the data set's own.")
    ANNOTATION_PATH: str = option(
        "", "part_imagenet: COCO file below DATA_PATHS. Empty: train.json, val.json, test.json."
    )
    SPLIT_COLUMN: Literal["split_closed", "split_closed_random", "split_open"] = option(
        "split_closed", "turtle_reid: the column that says which split an image belongs to."
    )
    SUBSET: Literal["", "worst_case", "best_case"] = option(
        "", "waterbirds: birds where they do not (worst_case) or do belong (best_case); empty: all."
    )
    NUM_SYNTHETIC: int = option(64, "Images that the synthetic source makes.", ge=1)
    SYNTHETIC_CLASSES: int = option(4, "Classes of the synthetic source.", ge=1)
    SYNTHETIC_SIZE: int = option(64, "Side of synthetic images in pixels.", ge=1)

    @property
    def label_type(self) -> str:
        """LABEL_TYPE in force: it counts only where nothing else says where labels come from."""
        return "standard" if self.LABEL_SOURCES or self.LABEL_PATHS else self.LABEL_TYPE


class Mix(Section):
    MIXUP: float = option(0.0, "Mixup alpha; 0: none. TASK.NAME=parts only; other tasks refuse it.", ge=0)
    CUTMIX: float = option(0.0, "CutMix alpha; 0: none. TASK.NAME=parts only; other tasks refuse it.", ge=0)
    CUTMIX_MINMAX: list[float] = option([], "CutMix: least and largest share of a side, instead of an alpha.")
    PROB: float = option(1.0, "Probability of mixing at all.", ge=0, le=1)
    SWITCH_PROB: float = option(0.5, "Probability of CutMix where both are on.", ge=0, le=1)
    MODE: Literal["batch", "pair", "elem"] = option("batch", "What is drawn once: for a batch, a pair, an image.")


class TrainSplit(Section):
    FRACTION: float = option(1.0, "Share of the training images that TRAIN takes; VAL takes the rest.", gt=0, le=1)
    ORDER: Literal["stratified", "file"] = option(
        "stratified", "stratified: the same share of every class; file: the first ones, as the original programs do."
    )
    SEED: int = option(0, "Seed of the stratified choice.", ge=0)


class Stream(Section):
    SHUFFLE: Literal["auto", "images", "shards"] = option(
        "auto",
        "Training order. images: all images in random order; shards: shards in random order, the images of SHUFFLE_SHARDS "
        "of them mixed at a time. auto: shards where they are fetched, else images.",
    )
    SHUFFLE_SHARDS: int = option(8, "Shards whose images are mixed at a time.", ge=1)
    CACHE_DIR: str = option(
        "", "Folder of this machine for fetched shards and lists of samples. Empty: ~/.cache/vissl_like/shards."
    )
    CACHE_GB: float = option(50.0, "Room for fetched shards in that folder, in 10^9 bytes.", gt=0)
    RETRIES: int = option(5, "How often a shard whose connection broke is asked for again.", ge=0)
    TIMEOUT_S: float = option(60.0, "Seconds that a server may be silent.", gt=0)
    IMAGE_MEMBER: str = option("", "Extension of the image in a sample, if there are several. Empty: the only image.")
    LABEL_MEMBER: str = option(
        "", "What holds the class of a sample: an extension (cls, txt) or json.FIELD. Empty: cls, else json.label."
    )


class Data(Section):
    NUM_DATALOADER_WORKERS: int = option(-1, "Loader processes per rank; 0: in the main process; -1: inferred.", ge=-1)
    PIN_MEMORY: bool = option(True, "Pin host memory when the device is a GPU.")
    MIX: Mix = group(Mix, "Mixing of the images of a training batch.")
    TRAIN_SPLIT: TrainSplit = group(TrainSplit, "How training images are parted into TRAIN and VAL (cub, nabirds).")
    AUGMENT_ON_DEVICE: Literal["auto", True, False] = option(
        "auto",
        "Colour, blur, solarisation at the end of TRANSFORMS run on whole batches on the device instead of in the loader "
        "processes, with the same random numbers per image. auto: on a GPU.",
    )
    REDUCED_DECODE: bool = option(
        False,
        "Decode a large JPEG at 1/2, 1/4 or 1/8 of its size where its crop still has twice the pixels of the result; "
        "faster, but pixels differ (by 0.2 of 255 in the mean).",
    )
    CATALOG: str = option(
        "", "JSON catalog of data sets {name: {train: [images, labels], val: [...]}}; see docs/start.md."
    )
    DOWNLOAD: bool = option(False, "Let torchvision data sets download themselves.")
    MAX_BAD_FRACTION: float = option(0.01, "Share of unreadable images above which the run is an error.", ge=0, le=1)
    STREAM: Stream = group(Stream, "Tar shards (DATA_SOURCES=[webdataset]).")
    TRAIN: Split = group(Split, "Training split.")
    VAL: Split = group(Split, "Validation split, used to choose hyper-parameters of probes. Optional.")
    TEST: Split = group(Split, "Test split: what is evaluated.")


class ExtractFeatures(Section):
    OUTPUT_DIR: str = option("", "Where features go. Empty: RUN.DIR/features.")
    SPLITS: list[Literal["TRAIN", "VAL", "TEST"]] = option([], "Splits to extract. Empty: every split that has data.")
    DTYPE: Literal["float32", "float16"] = option("float32", "Stored type.")
    SHARD_ROWS: int = option(65536, "Rows per memory-mapped shard file.", ge=1)
    FORMATS: list[Literal["safetensors", "parquet"]] = option([], "Further formats written beside the .npy shards.")
    CHUNK_THRESHOLD: int = option(-1, "Kept for old recipes; memory is bounded by SHARD_ROWS whatever it says.")
    MAP_FEATURES_TO_IMG_NAME: bool = option(False, "Also write one .npy per image, under its relative path.")


class ClusterFeatures(Section):
    EXTRACT: bool = option(False, "Extract the features first, in the same run.")
    PATH: str = option("", "Folder of extracted features. Empty: RUN.DIR/features.")
    DATA_PARTITION: Literal["TRAIN", "VAL", "TEST"] = option("TRAIN", "Split whose features are clustered.")
    TEST_PARTITION: Literal["", "TRAIN", "VAL", "TEST"] = option(
        "TEST", "Split assigned to the same centroids; '' for none."
    )
    DATASET_NAME: str = option("", "Prefix of the label files. Empty: the split's first DATASET_NAMES entry.")
    LAYER_NAME: str = option("", "Layer whose features are clustered. Empty: the only one extracted.")
    DIMENSIONALITY_REDUCTION: int = option(0, "PCA to this many dimensions before k-means; 0: none.", ge=0)
    PCA_WHITEN: bool = option(
        True, "Scale the dimensions of that PCA to equal variance, as VISSL does; false: keep their variances."
    )
    STANDARDIZE: bool = option(False, "Subtract the mean and divide by the deviation of each dimension first.")


class ClusterFit(Section):
    OUTPUT_DIR: str = option("", "Where label files go. Empty: RUN.DIR/clusters.")
    NUM_CLUSTERS: int = option(16000, "Number of clusters K.", ge=1)
    NUM_ITER: int = option(50, "Lloyd iterations.", ge=1)
    CLUSTER_BACKEND: Literal["auto", "faiss", "torch"] = option(
        "auto",
        "torch: reads rows block by block, shared by all processes, the same bits at any number of them; faiss: on the main "
        "process, with all rows that are trained on in its memory. auto: torch.",
    )
    INIT: Literal["random", "kmeans++"] = option(
        "random", "First centroids: random rows, or k-means++, which costs as much as some iterations."
    )
    PRECISION: Literal["float32", "tf32", "bfloat16"] = option(
        "float32",
        "Arithmetic of the products of rows and centroids during the iterations (torch). tf32 and bfloat16 are for GPUs, and "
        "given up where they make the objective of a block 0.1 % worse. Labels are always assigned in float32.",
    )
    CACHE_MB: int = option(
        32, "Rows that each process keeps in host memory between iterations (torch); the others are read again.", ge=0
    )
    SEED: int = option(-1, "Seed of the initial centroids; -1: SEED_VALUE.", ge=-1)
    NUM_REDO: int = option(1, "Runs from different centroids; the lowest objective wins.", ge=1)
    SPHERICAL: bool = option(False, "Renormalise centroids to length 1 after each iteration.")
    NORMALIZE: bool = option(True, "Divide each feature by its length + 1e-5 first.")
    MAX_POINTS_PER_CENTROID: int = option(256, "Train k-means on at most this many points per cluster; 0: all.", ge=0)
    DATA_LIMIT: int = option(-1, "Train k-means on this many rows; -1: all.", ge=-1)
    DATA_LIMIT_SAMPLING: LimitSampling = group(LimitSampling, "How DATA_LIMIT chooses rows (SEED only).")
    FEATURES: ClusterFeatures = group(ClusterFeatures, "Which features are clustered.")
