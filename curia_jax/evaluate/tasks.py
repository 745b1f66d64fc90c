"""The 19 tasks of CuriaBench, and how to write one of your own.

A task is one record. Its data is a folder of its name with the splits train, val and test as parquet or as `datasets` saved
them. Columns: `image` (nested lists of floats: rows, columns, and slices last where there are several; HU for CT, raw values for
MR), `mask` (of the same shape, or none), `target`, and where they are known `patient`, `series_id` and `filename`. Where the target
is a time to an event, `event` is 1 where it was seen and 0 where follow-up ended.

Names, classes and official settings are those of raidium-med/curia, read in November 2026; what it does not say is said so, or is in "(+ mask)".
Licences are those of the origin, with the page that states them; "see the origin" where none was read. The copies on the hub are gated and for
research only (RAIL-M).
"""

import dataclasses
import runpy
from pathlib import Path

from curia_common.errors import UserError

CT, MR, BOTH = "CT", "MR", "CT and MR"
IMAGE, MASKED_IMAGE, VOLUME, MASKED_VOLUME, PAIR = "2D", "2D + mask", "3D", "3D + mask", "pair"
# It is not published whether these have masks: they are used where the data has them.
IMAGE_OR_MASKED, VOLUME_OR_MASKED = "2D (+ mask)", "3D (+ mask)"
CLASSES, VALUE, TIME, FIELD = "classes", "value", "time to event", "field"
HUB = "Hugging Face: raidium/CuriaBench, config {}"


@dataclasses.dataclass(frozen=True)
class Official:
    """The settings of the official head: SGD with momentum 0.9, cosine schedule, cross-entropy or squared error, frozen encoder.

    Attributes:
      head: "linear" on one vector, or "attention" over tokens (self-attention, then one learned query) and a linear layer.
      epochs: passes over the training cases.
      base_rate: learning rate for a batch of 256; that of a batch is proportional to its size.
      batch: cases in a step.
      cached: the encoder runs once, not in every epoch.
    """

    head: str
    epochs: int
    base_rate: float
    batch: int = 64
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """A clinical task.

    Attributes:
      name: config of CuriaBench, and the folder of its data; a name of our own where CuriaBench has none.
      title: what the task predicts.
      origin: the datasets that it was made of.
      licence: of the origin.
      access: how to get the data.
      modality: CT (values are HU), MR (values are raw), or BOTH, where the column `modality` says which.
      form: of the input: IMAGE, MASKED_IMAGE, IMAGE_OR_MASKED, VOLUME, MASKED_VOLUME, VOLUME_OR_MASKED or PAIR.
      target: CLASSES, VALUE, TIME or FIELD.
      classes: number of classes.
      slices: of a volume, centred on its middle or on that of its mask; None takes all.
      metrics: that are published.
      clinical: columns that the floor without an image learns from, of tasks whose target is TIME.
      official: settings of the official head; None where they are not released.
      not_run: why the task cannot be scored; None if it can.
      parts: names of the tasks, each of another modality, that it is made of by a map of the classes that they share.
    """

    name: str
    title: str
    origin: str
    licence: str
    access: str
    modality: str
    form: str
    target: str = CLASSES
    classes: int | None = None
    slices: int | None = None
    metrics: tuple[str, ...] = ("accuracy", "auroc")
    clinical: tuple[str, ...] = ()
    official: Official | None = None
    not_run: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def masked(self) -> bool | None:
        """Whether features are those of a region: True, or False, or None where the data decides."""
        if self.form in (IMAGE_OR_MASKED, VOLUME_OR_MASKED):
            return None
        return self.form in (MASKED_IMAGE, MASKED_VOLUME)

    @property
    def volume(self) -> bool:
        """Whether a case has several slices."""
        return self.form in (VOLUME, MASKED_VOLUME, VOLUME_OR_MASKED)


CURIABENCH = (
    Task(
        name="anatomy-ct", title="organ in a CT slice", origin="TotalSegmentator CT", licence="see the origin",
        access=HUB.format("anatomy-ct"), modality=CT, form=MASKED_IMAGE, classes=54,
        official=Official("linear", epochs=10, base_rate=0.02),
    ),
    Task(
        name="anatomy-mri", title="organ in an MR slice", origin="TotalSegmentator MRI", licence="see the origin",
        access=HUB.format("anatomy-mri"), modality=MR, form=MASKED_IMAGE, classes=56,
        official=Official("linear", epochs=10, base_rate=0.01),
    ),
    Task(
        name="anatomy-cross-modality", title="organ, learned from CT and tested on MR, and the reverse",
        origin="TotalSegmentator CT and MRI", licence="see the origin",
        access="made of the data of anatomy-ct and anatomy-mri, by the map of the organs that they share (--class-map)",
        modality=BOTH, form=MASKED_IMAGE, metrics=("accuracy",), parts=("anatomy-ct", "anatomy-mri"),
    ),
    Task(
        name="ixi", title="age", origin="IXI", licence="CC BY-SA 3.0 (README of FLamby's fed_ixi)", access=HUB.format("ixi"), modality=MR, form=IMAGE,
        target=VALUE, metrics=("rmse", "mae", "r2"),
        official=Official("linear", epochs=1500, base_rate=0.002, cached=True),
    ),
    Task(
        name="registration", title="alignment of two exams", origin="not published; probably Learn2Reg abdomen",
        licence="see the origin", access="not published", modality=BOTH, form=PAIR, target=FIELD, metrics=(),
        not_run="it needs dense features, which are not scored yet, and neither its data nor its protocol is published",
    ),
    Task(
        name="luna16-3D", title="malignant lung nodule", origin="LUNA16", licence="CC BY 4.0 (luna16.grand-challenge.org/Data)", access=HUB.format("luna16-3D"),
        modality=CT, form=MASKED_VOLUME, classes=2, slices=3,
        official=Official("attention", epochs=50, base_rate=0.02, cached=True),
    ),
    Task(
        name="kits", title="malignant kidney lesion", origin="KiTS23", licence="see the origin", access=HUB.format("kits"),
        modality=CT, form=MASKED_IMAGE, classes=2, official=Official("linear", epochs=50, base_rate=0.002),
    ),
    Task(
        name="deep-lesion-site", title="site of a tumour", origin="DeepLesion", licence="see the origin",
        access=HUB.format("deep-lesion-site"), modality=CT, form=IMAGE_OR_MASKED, classes=8,
        official=Official("linear", epochs=50, base_rate=0.0005),
    ),
    Task(
        name="tcia-survival", title="survival with kidney cancer", origin="TCIA", licence="see the origin",
        access="not on the hub, and which collections of TCIA is not published; form, metric and clinical columns are ours", modality=CT, form=MASKED_IMAGE, target=TIME,
        metrics=("c_index",), clinical=("age", "sex", "stage"),
    ),
    Task(
        name="neural_foraminal_narrowing", title="foraminal narrowing", origin="RSNA lumbar spine 2024",
        licence="see the origin", access=HUB.format("neural_foraminal_narrowing"), modality=MR, form=IMAGE_OR_MASKED, classes=3,
        official=Official("linear", epochs=25, base_rate=0.005),
    ),
    Task(
        name="subarticular_stenosis", title="subarticular stenosis", origin="RSNA lumbar spine 2024",
        licence="see the origin", access=HUB.format("subarticular_stenosis"), modality=MR, form=IMAGE_OR_MASKED, classes=3,
        official=Official("linear", epochs=25, base_rate=0.01),
    ),
    Task(
        name="spinal_canal_stenosis", title="canal stenosis", origin="RSNA lumbar spine 2024",
        licence="see the origin", access=HUB.format("spinal_canal_stenosis"), modality=MR, form=IMAGE_OR_MASKED, classes=3,
        official=Official("linear", epochs=50, base_rate=0.005),
    ),
    Task(
        name="kneeMRI", title="tear of the anterior cruciate ligament", origin="KneeMRI, Rijeka", licence="see the origin",
        access=HUB.format("kneeMRI"), modality=MR, form=VOLUME_OR_MASKED, classes=3, slices=3,
        official=Official("attention", epochs=500, base_rate=0.005, cached=True),
    ),
    Task(
        name="ich", title="intracranial haemorrhage", origin="RSNA intracranial haemorrhage 2019, balanced", licence="see the origin",
        access=HUB.format("ich"), modality=CT, form=IMAGE, classes=2,
        official=Official("linear", epochs=10, base_rate=0.002),
    ),
    Task(
        name="emidec-classification-mask", title="myocardial infarction", origin="EMIDEC", licence="see the origin",
        access=HUB.format("emidec-classification-mask"), modality=MR, form=MASKED_IMAGE, classes=2,
        official=Official("linear", epochs=50, base_rate=0.001),
    ),
    Task(
        name="abdominal-trauma", title="abdominal trauma", origin="RSNA abdominal trauma 2023", licence="see the origin",
        access=f"{HUB.format('abdominal-trauma')}, if it is there", modality=CT, form=IMAGE, classes=2,
        official=Official("linear", epochs=10, base_rate=0.002),
    ),
    Task(
        name="atlas-stroke", title="stroke", origin="ATLAS R2", licence="see the origin", access=HUB.format("atlas-stroke"),
        modality=MR, form=VOLUME, classes=2, slices=1,
        official=Official("attention", epochs=60, base_rate=0.005, batch=32),
    ),
    Task(
        name="covidx-ct", title="pulmonary infection", origin="COVIDx CT, a part", licence="see the origin",
        access=HUB.format("covidx-ct"), modality=CT, form=IMAGE, classes=3,
        official=Official("linear", epochs=20, base_rate=0.0002),
    ),
    Task(
        name="oasis", title="Alzheimer's disease", origin="OASIS-1", licence="see the origin", access=HUB.format("oasis"),
        modality=MR, form=VOLUME, classes=2, official=Official("linear", epochs=50, base_rate=0.02, batch=16, cached=True),
    ),
)  # fmt: skip
SUITES = {"curiabench": CURIABENCH}


def find(word: str) -> Task:
    """The task of CuriaBench with this name, or the one that a Python file calls TASK.

    Raises:
      UserError: there is none.
    """
    for task in CURIABENCH:
        if task.name == word:
            return task
    if not word.endswith(".py"):
        raise UserError(
            f"no task {word!r}; --list shows those of CuriaBench, shards/LABEL is a label, FILE.py is your own"
        )
    if not Path(word).is_file():
        raise UserError(f"no file {word}; a task of your own is a Python file that sets TASK (see docs/evaluate.md)")
    task = runpy.run_path(word).get("TASK")
    if not isinstance(task, Task):
        raise UserError(f"{word} sets no TASK of type curia_jax.evaluate.tasks.Task; see docs/evaluate.md")
    return task
