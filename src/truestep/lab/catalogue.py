"""The table of image data sets: files, sizes, licences, checksums."""

from dataclasses import dataclass
from difflib import get_close_matches

from truestep.errors import TruestepError
from truestep.lab.download import DataFile

__all__ = ["DATASETS", "Dataset", "find_dataset"]


@dataclass(frozen=True)
class Dataset:
    """A published data set of 28 x 28 images in ten classes.

    Attributes:
        name: Name on the command line.
        title: Name for headings.
        licence: Licence and owner.
        train: Number of training images.
        test: Number of test images.
        classes: Names of the classes, in the order of their labels.
        files: The files: four IDX files, or two npz archives (training, test).
        folders: Folders below the data folder where a local copy is looked for, own first.
        stand_ins: Data sets used in its place where they are at hand and it is not.
        remark: What a reader of a result must know about this data.
    """

    name: str
    title: str
    licence: str
    train: int
    test: int
    classes: tuple[str, ...]
    files: tuple[DataFile, ...]
    folders: tuple[str, ...]
    stand_ins: tuple[str, ...] = ()
    remark: str = ""


def find_dataset(name: str) -> Dataset:
    """Looks a data set up by name.

    Example:
        >>> find_dataset("fashion-mnist").train
        60000

    Raises:
        TruestepError: No data set has that name.
    """
    if name in DATASETS:
        return DATASETS[name]
    close = get_close_matches(name, DATASETS, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise TruestepError(
        f"There is no data set {name!r}{meant}; choose one of: {', '.join(DATASETS)}."
    )


_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_files(
    urls: tuple[str, ...], checksums: tuple[str, ...], contents: tuple[str, ...]
) -> tuple[DataFile, ...]:
    return tuple(
        DataFile(
            name, tuple(url + name for url in urls), checksum and f"sha256:{checksum}", content
        )
        for name, checksum, content in zip(_MNIST_FILES, checksums, contents, strict=True)
    )


_DIGITS = tuple("0123456789")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_KMNIST_LICENCE = "CC BY-SA 4.0, ROIS-DS Center for Open Data in the Humanities"
_KMNIST = _idx_files(
    ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    # as in tensorflow_datasets/url_checksums/kmnist.txt
    (
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
    # The content of the training files could not be computed when this was written
    (
        "",
        "",
        "76fbd229ce87db80dd281af5e6670de4ad0e42fb30a7bd643972994c47c1f42e",
        "a11dc742be8e781a40a92f53d6a4957e7b7d36df2faa097659131ebfd8fd60c6",
    ),
)
# Pinned to a commit, so that the address means these files for ever
_QUICKDRAW = (
    "https://raw.githubusercontent.com/zaidalyafeai/QuickDraw10/"
    "8c6671def6aebd40067531ea67094d52dbe0bad6/dataset/"
)

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="mnist",
            title="MNIST",
            licence="CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
            train=60_000,
            test=10_000,
            classes=_DIGITS,
            files=_idx_files(
                (
                    "https://ossci-datasets.s3.amazonaws.com/mnist/",
                    "https://storage.googleapis.com/cvdf-datasets/mnist/",
                ),
                (
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
                (
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                ),
            ),
            # the second is where torchvision keeps it, likewise below
            folders=("mnist", "MNIST/raw"),
        ),
        Dataset(
            name="fashion-mnist",
            title="Fashion-MNIST",
            licence="MIT, Zalando SE",
            train=60_000,
            test=10_000,
            classes=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            files=_idx_files(
                (
                    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                ),
                (
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
                (
                    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                ),
            ),
            folders=("fashion-mnist", "FashionMNIST/raw"),
        ),
        Dataset(
            name="kmnist",
            title="KMNIST",
            licence=_KMNIST_LICENCE,
            train=60_000,
            test=10_000,
            classes=_KANA,
            files=_KMNIST,
            folders=("kmnist", "KMNIST/raw"),
            stand_ins=("kmnist10k",),
        ),
        Dataset(
            name="kmnist10k",
            title="KMNIST10k",
            licence=_KMNIST_LICENCE,
            train=8_000,
            test=2_000,
            classes=_KANA,
            files=_idx_files(
                (),
                ("", "", "", ""),
                (
                    "413028ba411261c5c72555b03612b2a857ddec3cd4489b11722691b3f7ffba87",
                    "cf0f41b864195af1e754c85b48491f31a1a77ac9993733890f3d3f79d3d13c14",
                    "3a0a7ac6c410d351ffcc3ed34433bb8c2df7cf3eb4fab9abb3206418a882f4c4",
                    "50e4da1432f4583a65d81ecd9622ef8197595ec401b250902c681a7c4666833a",
                ),
            ),
            folders=("kmnist10k",),
            remark=(
                "the 10,000 test images of KMNIST split again 8,000 to 2,000 by class, "
                "not comparable with published KMNIST figures"
            ),
        ),
        Dataset(
            name="kmnist-test",
            title="KMNIST, test images only",
            licence=_KMNIST_LICENCE,
            train=0,
            test=10_000,
            classes=_KANA,
            files=_KMNIST[2:],
            folders=("kmnist-test", "kmnist", "KMNIST/raw"),
        ),
        Dataset(
            name="quickdraw10",
            title="QuickDraw10",
            licence="CC BY 4.0, Google (selection by Zaid Alyafeai)",
            train=80_000,
            test=20_000,
            classes=(
                "cloud",
                "sun",
                "pants",
                "umbrella",
                "table",
                "ladder",
                "eyeglasses",
                "clock",
                "scissors",
                "cup",
            ),
            # no other checksums of these two are published
            files=(
                DataFile(
                    "train-ubyte.npz",
                    (_QUICKDRAW + "train-ubyte.npz",),
                    "git:c044ae9174274083c97cbcf1b8b6c5ab13a6d075",
                ),
                DataFile(
                    "test-ubyte.npz",
                    (_QUICKDRAW + "test-ubyte.npz",),
                    "git:2801db1a051a4d963280e836a30af4c1992e5702",
                ),
            ),
            folders=("quickdraw10",),
            stand_ins=("quickdraw10-other",),
        ),
        Dataset(
            name="quickdraw10-other",
            title="QuickDraw, ten other classes",
            licence="CC BY 4.0, Google",
            train=32_000,
            test=8_000,
            classes=(
                "airplane",
                "banana",
                "bird",
                "book",
                "cat",
                "clock",
                "dog",
                "flower",
                "house",
                "rainbow",
            ),
            files=_idx_files(
                (),
                ("", "", "", ""),
                (
                    "a46f5a063cc0af56ecbd5cace90b059396ba3c93baaae3b9e53509a9a9035cc1",
                    "b60d8d65124fd2ef7b74fd64a372c4654ee01bf40b28c235bab8824d8cb81565",
                    "dd728336c30162c50b2e3ea88dfad024a5078b44ab5699fcb6ab2456cb30fdba",
                    "210718fd084f2bfc4c0b86208b2c05ef61acb1dc5e4b90e82eedba948ca5408b",
                ),
            ),
            folders=("quickdraw10-other", "quickdraw10"),
            remark=(
                "airplane, banana, bird, book, cat, clock, dog, flower, house and rainbow: not the "
                "classes or the size (80,000 and 20,000) of the published QuickDraw10, "
                "not comparable with its figures"
            ),
        ),
    )
}
