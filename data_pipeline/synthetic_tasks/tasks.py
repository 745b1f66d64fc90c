"""The tasks of the phantom, by their CuriaBench names."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from curia_common.errors import UserError
from data_pipeline.synthetic_anatomy import generator
from data_pipeline.synthetic_tasks import findings, organs
from data_pipeline.synthetic_tasks.pictures import Patient, Picture

SPLITS = ("train", "val", "test")
TRAIN_FACTOR = 3  # training patients for every test patient; as many in validation as in test


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      config: its name in CuriaBench, and that of its folder.
      modality: "CT" or "MR".
      form: of the images: "2D", "2D + mask", "3D" or "3D + mask".
      target: what it is, in words.
      draw: the pictures of a patient.
      classes: names in the order of their numbers; empty for values.
      shares: of the classes among the patients; even unless given.
      factor: of the number of patients.
      class_of_picture: the class is not the patient's, but that of the organ in the mask.
    """

    config: str
    title: str
    modality: str
    form: str
    target: str
    draw: Callable[[Patient], list[Picture]]
    classes: tuple[str, ...] = ()
    shares: tuple[int, ...] = ()
    factor: int = 1
    class_of_picture: bool = False


def _names(regions: organs.Regions) -> tuple[str, ...]:
    return tuple(organ for names in regions.values() for organ in names)


_GRADES = ("normal or mild", "moderate", "severe")
TASKS = (
    Task("anatomy-ct", "CT organ recognition", "CT", "2D + mask", "the organ in the mask", findings.ct_organs,
         _names(organs.CT), class_of_picture=True),
    Task("anatomy-mri", "MR organ recognition", "MR", "2D + mask", "the organ in the mask", findings.mr_organs,
         _names(organs.MR), class_of_picture=True),
    Task("ixi", "Age", "MR", "2D", "age in years", findings.age),
    Task("luna16", "Lung nodule malignancy, in a slice", "CT", "2D + mask", "malignant", findings.nodule_slice,
         ("benign", "malignant")),
    Task("luna16-3D", "Lung nodule malignancy", "CT", "3D + mask", "malignant", findings.nodule_volume,
         ("benign", "malignant")),
    Task("kits", "Kidney lesion malignancy", "CT", "2D + mask", "malignant", findings.kidney_lesion,
         ("benign", "malignant"), (1, 2)),
    Task("deep-lesion-site", "Tumour anatomical site", "CT", "2D + mask", "where the lesion is", findings.lesion_site,
         findings.SITES, factor=3),
    Task("tcia-survival", "Kidney cancer survival", "CT", "2D + mask", "months to death (event 1) or last contact (event 0)",
         findings.kidney_survival, factor=2),
    Task("neural_foraminal_narrowing", "Foraminal narrowing", "MR", "2D + mask", "grade", findings.foraminal_narrowing,
         _GRADES, (3, 2, 1)),
    Task("subarticular_stenosis", "Subarticular stenosis", "MR", "2D + mask", "grade", findings.subarticular_stenosis,
         _GRADES, (3, 2, 1)),
    Task("spinal_canal_stenosis", "Canal stenosis", "MR", "2D + mask", "grade", findings.canal_stenosis, _GRADES, (3, 2, 1)),
    Task("kneeMRI", "ACL tear", "MR", "3D + mask", "tear", findings.ligament_tear, ("intact", "partial", "complete"), (3, 2, 1)),
    Task("ich", "Intracranial haemorrhage", "CT", "2D", "any haemorrhage", findings.haemorrhage, ("no", "yes"), factor=2),
    Task("emidec-classification-mask", "Myocardial infarction", "MR", "2D + mask", "infarct", findings.infarction,
         ("no", "yes"), (1, 2)),
    Task("abdominal-trauma", "Abdominal trauma", "CT", "2D", "injury", findings.abdominal_trauma, ("no", "yes"), factor=2),
    Task("atlas-stroke", "Stroke signs", "MR", "3D", "stroke in the middle slice", findings.stroke, ("no", "yes"), factor=2),
    Task("covidx-ct", "Pulmonary infection", "CT", "2D", "infection", findings.lung_infection,
         ("normal", "pneumonia", "COVID-19")),
    Task("oasis", "Alzheimer", "MR", "3D", "Alzheimer's disease", findings.alzheimer, ("no", "yes")),
)  # fmt: skip
# Tasks of CuriaBench that have no folder, and why.
WITHOUT_FOLDER = {
    "anatomy-cross-modality": "it is made of anatomy-ct and anatomy-mri, by the organs that they share",
    "registration": "the schema of its pairs is not published",
}


def choose(names: str | None) -> tuple[Task, ...]:
    """The tasks with the names, which have commas between; all for None.

    Raises:
      UserError: there is none of a name.
    """
    if names is None:
        return TASKS
    by_name = {task.config: task for task in TASKS}
    chosen = [name for name in names.split(",") if name]
    if not chosen:
        raise UserError(f"--tasks is empty; there are: {', '.join(by_name)}")
    for name in chosen:
        if name not in by_name:
            raise UserError(f"--tasks: no task {name!r}; there are: {', '.join(by_name)}")
    return tuple(by_name[name] for name in dict.fromkeys(chosen))


def patients(task: Task, split: str, test_patients: int) -> int:
    """How many patients a split of a task has."""
    return test_patients * task.factor * (TRAIN_FACTOR if split == "train" else 1)


def draw(task: Task, split: str, test_patients: int, seed: int, size: int) -> Iterator[list[Picture]]:
    """The pictures of the patients of a split, in turn; they follow from the seed, whatever other tasks are written."""
    count = patients(task, split, test_patients)
    targets = np.zeros(count, int)
    if task.classes and not task.class_of_picture:
        shares = np.array(task.shares or (1,) * len(task.classes))
        targets = np.resize(np.repeat(np.arange(len(shares)), shares), count)
        generator(seed, task.config, split, "targets").shuffle(targets)
    for number in range(count):
        target = int(targets[number])
        pictures = task.draw(Patient(generator(seed, task.config, split, number), split, number, target, size))
        yield [p if p.target is not None else p._replace(target=target) for p in pictures]
