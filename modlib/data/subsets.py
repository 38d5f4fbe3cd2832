"""Sets of ImageNet photographs: which class folders they have, what these are called, how many images there are.

Such a set is taken out of a folder tree (``modlib.data.layouts``): its own, or for ``imagenet-100`` that of all
of ILSVRC 2012.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modlib.data.layouts import Files, is_tree, list_tree


@dataclass(frozen=True)
class Subset:
    """Which images of a tree make up a set.

    Args:
        unpack: which archive the tree comes out of, in words.
        train: how many training images the set has; another number means another set.
        test: likewise, test images.
        classes: class folders in the order of their numbers, with the classes' names; all folders of the tree,
            if there are none here.
        side: of the images in pixels, where all have the same; else 0.
    """

    unpack: str
    train: int
    test: int
    classes: Mapping[str, str]
    side: int = 0

    def take(self, name: str, tree: Path) -> tuple[dict[str, Files], list[str]]:
        """The images of "train" and "test" with the numbers of their classes, and the classes' names.

        Raises:
            ValueError: if ``tree`` holds another set, or none.
        """
        if not is_tree(tree):
            raise ValueError(
                f"{tree} has no folder train; give the folder that {self.unpack} unpacks to, which holds train "
                f"and val."
            )
        files, folders = list_tree(tree, list(self.classes) or None)
        held, due = [len(files["train"]), len(files["test"])], [self.train, self.test]
        if held != due:
            raise ValueError(
                f"{tree} holds {held[0]} training and {held[1]} test images of {name}'s classes but {name} "
                f"has {due[0]} and {due[1]}; give the folder that {self.unpack} unpacks to, or load this one "
                f"by its path."
            )
        return files, self.named(tree, folders)

    def named(self, tree: Path, folders: list[str]) -> list[str]:
        """What classes are called, the first of the words that Tiny ImageNet's words.txt has for them."""
        words = tree / "words.txt"
        lines = words.read_text(encoding="utf-8").splitlines() if words.is_file() else []
        known = {wnid: name for wnid, _, name in (line.partition("\t") for line in lines)}
        return [self.classes.get(f) or known.get(f, f).split(",")[0] for f in folders]


TINY = Subset("tiny-imagenet-200.zip", 100_000, 10_000, {}, side=64)
TINY_20 = Subset(
    "tiny-imagenet-200.zip",
    10_000,
    1_000,
    {
        "n01443537": "goldfish",
        "n02504458": "African elephant",
        "n02056570": "king penguin",
        "n02279972": "monarch",
        "n02099601": "golden retriever",
        "n02124075": "Egyptian cat",
        "n04146614": "school bus",
        "n04285008": "sports car",
        "n02917067": "bullet train",
        "n07749582": "lemon",
        "n07873807": "pizza",
        "n04398044": "teapot",
        "n04507155": "umbrella",
        "n04540053": "volleyball",
        "n02814860": "beacon",
        "n04366367": "suspension bridge",
        "n03447447": "gondola",
        "n04356056": "sunglasses",
        "n07753592": "banana",
        "n07734744": "mushroom",
    },
    side=64,
)
IMAGENETTE = Subset(
    "imagenette2.tgz (or its 320 px or 160 px version)",
    9_469,
    3_925,
    {
        "n01440764": "tench",
        "n02102040": "English springer",
        "n02979186": "cassette player",
        "n03000684": "chain saw",
        "n03028079": "church",
        "n03394916": "French horn",
        "n03417042": "garbage truck",
        "n03425413": "gas pump",
        "n03445777": "golf ball",
        "n03888257": "parachute",
    },
)
IMAGEWOOF = Subset(
    "imagewoof2.tgz (or its 320 px or 160 px version)",
    9_025,
    3_929,
    {
        "n02086240": "Shih-Tzu",
        "n02087394": "Rhodesian ridgeback",
        "n02088364": "beagle",
        "n02089973": "English foxhound",
        "n02093754": "Border terrier",
        "n02096294": "Australian terrier",
        "n02099601": "golden retriever",
        "n02105641": "Old English sheepdog",
        "n02111889": "Samoyed",
        "n02115641": "dingo",
    },
)
# The classes drawn by Tian, Krishnan and Isola, Contrastive Multiview Coding (arXiv:1906.05849): the list that
# they published, in its order (imagenet100.txt of github.com/HobbitLong/CMC).
_TIAN = """
    n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
    n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
    n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
    n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
    n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
    n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
    n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
    n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
    n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
    n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
"""
IMAGENET_100 = Subset(
    "ILSVRC 2012 (ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or Kaggle's archive)",
    126_689,
    5_000,
    {wnid: wnid for wnid in _TIAN.split()},
)
IMAGENET = Subset(IMAGENET_100.unpack, 1_281_167, 50_000, {})
