"""The settings of the data, and the only place with their defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kd_trainer.argument_checks import FlagSize, image_size
from kd_trainer.errors import clipped
from kd_trainer.fields import check_at_least, check_choice, expanded, help_field
from kd_trainer.mask_flags import ClassMembers, color_members, merged_members
from kd_trainer.metrics import check_class_names
from kd_trainer.models.image_sizes import Size, as_size

AUGMENTATIONS = ("heavy", "seed", "light", "none")
LAYOUTS = ("folders", "voc", "cityscapes", "metadata", "csv", "coco", "parquet")
ON_BAD_SAMPLE = ("error", "skip")
MASK_KINDS = ("values", "colors", "alpha", "fractions")
RESIZES = ("stretch", "fit", "crop")
EVAL_SIZES = ("input", "native", "windows")
CUTMIX_MODES = ("box", "class")
MOST_VIEWS = 2


@dataclass
class DataArguments:
    """Where images and masks come from, and what happens to them."""

    dataset: str = help_field(
        "",
        "Folder of images and masks in any usual layout, csv file of their paths, COCO json, "
        "parquet file or folder, Hub id, or `synthetic`.",
        metavar="SOURCE",
    )
    dataset_config: str | None = help_field(
        None, "Configuration of a data set on the Hub that has several."
    )
    train_split: str = help_field("train", "Name of the split to train on.")
    eval_split: str = help_field("validation", "Name of the split to evaluate on.")
    eval_fraction: float = help_field(
        0.1,
        "Share of the images that is held out to evaluate on where the data has no split for it; "
        "always the same ones. 0 holds none out.",
    )
    group_by: str | None = help_field(
        None,
        "Regular expression on the images' paths: those of the same first group (or match), such "
        "as a patient, are held out together; none: each by itself (default: those of one folder, "
        "where at least three folders hold several).",
        metavar="PATTERN",
    )
    layout: str | None = help_field(
        None,
        "How a folder is laid out, where it can be read in several ways: folders, voc, "
        "cityscapes, metadata, csv, coco or parquet (default: found).",
    )
    image_folder: str | None = help_field(
        None,
        "What folders of images are called; `*` stands for any text (default: found). Of a csv: "
        "where its paths begin.",
    )
    mask_folder: str | None = help_field(None, "What folders of masks are called, likewise.")
    category: list[str] | str | None = help_field(
        None, "COCO: the category that is the foreground; several make one foreground."
    )
    image_column: str = help_field("image", "Column of the images (parquet, Hub).")
    mask_column: str = help_field("mask", "Column of the masks (parquet, Hub).")
    num_labels: int | None = help_field(
        None,
        "Classes with the background; 2 is a binary task with one logit (default: found in the "
        "data).",
    )
    multi_label: bool = help_field(
        False,
        "Several labels a pixel: each of --num_labels classes is a mask of its own, found by a "
        "sigmoid, and there is no background. Masks are .npy of 0 and 1, (K, H, W) or (H, W, K), "
        "or drawn from COCO.",
    )
    in_channels: int | None = help_field(
        None,
        "Read images with so many channels, by their own bit depth (TIFF, PNG of 16 bits, floats, "
        ".npy), instead of as 8-bit RGB. Only geometric augmentation is left then.",
    )
    channel_mean: list[float] | None = help_field(
        None, "With --in_channels: mean of each, of scaled values (default: measured)."
    )
    channel_std: list[float] | None = help_field(None, "Standard deviation, likewise.")
    class_names: list[str] | None = help_field(
        None,
        "Names of the classes, background first (default: those of the source, where it has any).",
    )
    mask_kind: str | None = help_field(
        None,
        "What the mask files hold: values (grey levels, class ids), colors, alpha (how opaque a "
        "pixel is) or fractions (0.0 to 1.0) (default: found in the files).",
    )
    mask_values: list[int] | None = help_field(
        None, "Values in the mask files, in class order (0/1, 0/255 and class ids are found)."
    )
    mask_colors: list[str] | None = help_field(
        None,
        "Colours in the mask files, in class order: 0,0,0 255,0,0 or with names background=0,0,0 "
        "person=#ff0000. One name twice is one class; ignore=... counts nowhere.",
        metavar="COLOR",
    )
    merge_classes: list[str] | None = help_field(
        None,
        "New classes in order, each of values (or names, where the data has some) that are "
        "merged: background=rest person=11,12-14. ignore=... counts nowhere.",
        metavar="NAME=VALUES",
    )
    ignore_values: list[int] | None = help_field(
        None, "Further mask values whose pixels count nowhere."
    )
    reduce_labels: bool | None = help_field(
        None,
        "Mask value 0 counts nowhere and value i is class i - 1, as in ADE20K (default: as the "
        "preprocessing of the teacher, or of the model that is measured, has do_reduce_labels).",
    )
    mask_threshold: int | None = help_field(
        None, "Binary masks: values from this one on are foreground, all below background."
    )
    ignore_index: int = help_field(
        255, "Mask value whose pixels count nowhere. 0 is the same as --reduce_labels."
    )
    unlabelled: str | None = help_field(
        None, "Folder of images without masks, used by the distillation terms only."
    )
    streaming: bool = help_field(False, "Stream the data instead of indexing it.")
    image_size: FlagSize = help_field(
        640,
        "Size of the network input in pixels: one number for a square, or height and width, such "
        "as 512 1024.",
    )
    resize: str = help_field(
        "stretch",
        "How images get to that size: stretch; fit keeps the aspect ratio and pads at the right or "
        "below; crop trains on random parts of the image fitted in and scaled by 0.5 to 2, and "
        "else fits it in. A saved student fits or stretches as it was trained.",
    )
    eval_size: str = help_field(
        "input",
        "At which size the final figures are counted: input, that of the network; native, that of "
        "each image and mask on the disk, as published figures are; windows, likewise, from "
        "overlapping parts of larger images instead of the whole one. Evaluations during a "
        "training are at that of the input.",
    )
    augmentation: str = help_field("heavy", "heavy, seed (the recipe's short list), light or none.")
    brightness_contrast_probability: float = help_field(
        0.8,
        "Probability of the brightness/CLAHE/gamma group of the heavy augmentation, and of "
        "brightness and contrast in seed.",
    )
    scale_jitter: list[float] | None = help_field(
        None,
        "Train on random parts of the image scaled by a random factor from MIN to MAX, beside "
        "--resize stretch or fit; of crop it is the range of its factor.",
        metavar="FACTOR",
    )
    cutmix: float = help_field(
        0.0,
        "Probability that a part of another image of the batch is pasted into an image, with its "
        "labels and the teacher's answers.",
    )
    cutmix_mode: str = help_field(
        "box",
        "Which part: a box of 2 to 40 % of the image, or the pixels of half of the classes that "
        "the other image shows (class).",
    )
    strong_views: int = help_field(
        0,
        "Show the student so many views (1 or 2) of each image whose colours and sharpness are "
        "strongly changed, and the teacher one that has only the geometry of --augmentation.",
    )
    synthetic_train: int = help_field(480, "Images drawn for training (dataset `synthetic`).")
    synthetic_eval: int = help_field(120, "Images drawn for evaluation, likewise.")
    max_train_samples: int | None = help_field(None, "Use only the first N training samples.")
    max_eval_samples: int | None = help_field(None, "Use only the first N evaluation samples.")
    on_bad_sample: str = help_field(
        "error",
        "What an image or mask that cannot be used does: `error` stops and names the file; "
        "`skip` looks through all files first (streams: on the way), leaves the bad ones out and "
        "lists them in bad_samples.txt. Nothing ever takes their place.",
    )
    max_bad_share: float = help_field(
        0.01, "With --on_bad_sample skip: stop if more than this share of a split is bad."
    )

    def __post_init__(self) -> None:
        self.dataset, self.unlabelled = expanded(self.dataset), expanded(self.unlabelled)
        self.category = self.categories or None
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        self.image_size = image_size("image_size", self.image_size)
        check_choice("resize", self.resize, RESIZES)
        check_choice("eval_size", self.eval_size, EVAL_SIZES)
        self._check_views()
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        self._check_hold_out()
        if self.num_labels is None:
            self.num_labels = self._implied_labels()
        elif self.num_labels < 2:
            raise ValueError(
                f"Expected --num_labels of at least 2 (background and foreground), got "
                f"{self.num_labels}. A binary task has 2 labels and one logit."
            )
        if self.class_names is not None and len(self.class_names) != self.label_count:
            raise ValueError(
                f"Expected {self.num_labels} --class_names (one per label, background first), got "
                f"{len(self.class_names)}: {clipped(' '.join(self.class_names), 200)}."
            )
        self._check_masks()
        if self.multi_label:
            self._check_multi_label()
        self._check_channels()
        check_choice("on_bad_sample", self.on_bad_sample, ON_BAD_SAMPLE)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                f"Expected --max_bad_share between 0 and 1, got {self.max_bad_share}. 0.01 is one "
                "sample in a hundred."
            )
        if self.on_bad_sample == "error" and self.max_bad_share != type(self).max_bad_share:
            raise ValueError(
                f"Expected --on_bad_sample skip with --max_bad_share {self.max_bad_share:g}, got "
                "error, with which no bad sample is let through. Add it, or leave the share out."
            )
        if self.num_labels is not None:
            check_class_names(list(self.id2label.values()))
        if not 0 <= self.brightness_contrast_probability <= 1:
            raise ValueError(
                "Expected --brightness_contrast_probability between 0 and 1, got "
                f"{self.brightness_contrast_probability}."
            )

    def _check_views(self) -> None:
        """Refuse views that cannot be drawn, or that nothing would show."""
        check_choice("cutmix_mode", self.cutmix_mode, CUTMIX_MODES)
        if not 0 <= self.cutmix <= 1:
            raise ValueError(
                f"Expected --cutmix between 0 and 1, got {self.cutmix:g}. It is the probability "
                "for each image; 0 mixes none."
            )
        if self.cutmix_mode == "class" and (self.cutmix == 0 or self.multi_label):
            if self.multi_label:
                raise ValueError(
                    "Expected --cutmix_mode box with --multi_label, got class: a pixel may be of "
                    "several classes there. Leave one of them out."
                )
            raise ValueError(
                "Expected --cutmix above 0 with --cutmix_mode class, got 0, which mixes nothing. "
                "Say how often, such as --cutmix 0.5."
            )
        if self.strong_views not in range(MOST_VIEWS + 1):
            raise ValueError(
                f"Expected --strong_views 1 or 2 (0: none), got {self.strong_views}. Each of them "
                "costs a pass of the student in each step."
            )
        jitter = self.scale_jitter
        if jitter is not None and (len(jitter) != 2 or not 0.1 <= jitter[0] <= jitter[1] <= 10):
            raise ValueError(
                "Expected two factors between 0.1 and 10 as --scale_jitter, the smaller one first, "
                f"got {' '.join(f'{factor:g}' for factor in jitter)}. Write 0.5 2, say."
            )

    def _implied_labels(self) -> int | None:
        """The classes that other settings name; None where the data has to be looked at."""
        if self.dataset in ("", "synthetic") or self.category or self.mask_threshold is not None:
            return 2
        members = self.class_members
        named = self.class_names or self.mask_values or (members and members.members)
        return len(named) if named else None

    def _check_channels(self) -> None:
        """Refuse what reads images as 8-bit RGB beside `--in_channels`."""
        given = [
            name for name in ("channel_mean", "channel_std") if getattr(self, name) is not None
        ]
        if self.in_channels is None:
            if given:
                raise ValueError(f"Expected --in_channels with --{given[0]}, got none. Add it.")
            return
        check_at_least("in_channels", self.in_channels, 1)
        lengths = {len(getattr(self, name)) for name in given}
        if len(given) == 1 or lengths - {self.in_channels}:
            raise ValueError(
                f"Expected --channel_mean and --channel_std of {self.in_channels} numbers each, "
                f"got {', '.join(f'{len(getattr(self, n))} as --{n}' for n in given)}. Give both."
            )
        wrong = ["on_bad_sample"] if self.on_bad_sample == "skip" else []
        wrong += ["unlabelled"] if self.unlabelled is not None else []
        wrong += ["strong_views"] if self.strong_views else []
        wrong += ["dataset"] if self.dataset == "synthetic" else []
        if wrong:
            raise ValueError(
                f"Expected no --{wrong[0]} {getattr(self, wrong[0])} with --in_channels, got it: "
                "that knows 8-bit RGB images only, so far. Leave one of them out."
            )

    def _check_multi_label(self) -> None:
        """Refuse what says how one class a pixel is read."""
        others = ("mask_values", "mask_colors", "mask_kind", "mask_threshold", "merge_classes")
        every = (*others, "reduce_labels", "category")
        names = [name for name in every if getattr(self, name) not in (None, False)]
        if self.on_bad_sample == "skip":
            names.append("on_bad_sample")
        if names:
            raise ValueError(
                f"Expected no --{names[0]} with --multi_label, got {getattr(self, names[0])}: "
                "planes of 0 and 1 are read as they are, and a bad one is an error. Leave it out."
            )
        if self.dataset == "synthetic":
            raise ValueError(
                "Expected a data set of planes with --multi_label, got synthetic, which has one "
                "class a pixel. Leave one of them out."
            )

    def _check_hold_out(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"Expected --eval_fraction from 0 to below 1, got {self.eval_fraction}. 0.1 is one "
                "image in ten."
            )
        try:
            re.compile(self.group_by or "")
        except (re.error, RecursionError) as error:
            raise ValueError(
                f"Expected a regular expression as --group_by, got {self.group_by!r}: {error}. "
                "'(.*)_' takes what stands in front of the last _."
            ) from None

    def _check_masks(self) -> None:
        """Refuse flags that say two things of the masks; 0 as `ignore_index` is reduced labels."""
        if self.ignore_index == 0:
            self._ignore_zero()
        if self.mask_kind is not None:
            check_choice("mask_kind", self.mask_kind, MASK_KINDS)
        flags = {
            "--reduce_labels": bool(self.reduce_labels),
            "--mask_values": self.mask_values is not None,
            "--mask_colors": self.mask_colors is not None,
            "--merge_classes": self.merge_classes is not None,
            "--mask_threshold": self.mask_threshold is not None,
        }
        given = [flag for flag, is_given in flags.items() if is_given]
        if len(given) > 1:
            raise ValueError(
                f"Expected either {given[0]} or {given[1]}, got both, which say two things of the "
                "masks. Leave one out."
            )
        if self.mask_threshold is not None:
            check_at_least("mask_threshold", self.mask_threshold, 1)
            if self.label_count != 2:
                raise ValueError(
                    f"Expected --mask_threshold {self.mask_threshold} for a binary task alone, got "
                    f"it with --num_labels {self.num_labels}. Leave one out."
                )
        if self.mask_colors is not None and self.mask_kind not in (None, "colors"):
            raise ValueError(
                f"Expected --mask_kind colors with --mask_colors, got {self.mask_kind}. Leave one "
                "out."
            )
        members = self.class_members
        if members is not None and len(members.members) != self.label_count:
            raise ValueError(
                f"Expected {self.num_labels} classes (--num_labels) in {given[0]}, got "
                f"{len(members.members)}. Set --num_labels {len(members.members)}, or name all."
            )

    def _ignore_zero(self) -> None:
        """Value 0 counts nowhere; which number the labels have for that is nobody's concern."""
        if self.reduce_labels is False:
            raise ValueError(
                "Expected --ignore_index above 0 with --reduce_labels false, got 0. Leave one out."
            )
        self.ignore_index = type(self).ignore_index
        named = (self.mask_values, self.mask_colors, self.merge_classes, self.mask_threshold)
        if all(flag is None for flag in named):
            self.reduce_labels = True
        else:
            self.ignore_values = sorted({0, *(self.ignore_values or ())})

    @property
    def class_members(self) -> ClassMembers | None:
        """What `mask_colors` or `merge_classes` make each class of; None without either."""
        if self.mask_colors is not None:
            return color_members(self.mask_colors)
        return None if self.merge_classes is None else merged_members(self.merge_classes)

    @property
    def label_count(self) -> int:
        """`num_labels` where it is known.

        Raises:
            ValueError: where it is not: the data has not been looked at.
        """
        if self.num_labels is None:
            raise ValueError(
                "Expected --num_labels (classes with the background), got none, and nothing here "
                "looks at the masks for it. Give it."
            )
        return self.num_labels

    @property
    def input_size(self) -> Size:
        """`image_size` as (height, width)."""
        return as_size(self.image_size)

    @property
    def keep_aspect_ratio(self) -> bool:
        """Whether images that are not augmented are fitted in instead of stretched."""
        return self.resize != "stretch"

    @property
    def id2label(self) -> dict[int, str]:
        """Name of every class; class 0 is the background, unless a pixel may have several."""
        if self.class_names is not None:
            return dict(enumerate(self.class_names))
        if self.multi_label:
            return {i: f"class_{i}" for i in range(self.label_count)}
        members = self.class_members
        if members is not None and members.names is not None:
            return dict(enumerate(members.names))
        if self.label_count == 2:
            # What nobody named has no name: a model that finds cats must not say `person`.
            drawn = "person" if self.dataset == "synthetic" else "foreground"
            return {0: "background", 1: self.foreground or drawn}
        return {0: "background"} | {i: f"class_{i}" for i in range(1, self.label_count)}

    @property
    def foreground(self) -> str | None:
        """Name of the foreground that `--category` makes of one or several; None without it."""
        return None if self.category is None else "+".join(self.categories)

    @property
    def categories(self) -> list[str]:
        """What `--category` names; empty without it."""
        return [self.category] if isinstance(self.category, str) else list(self.category or ())
