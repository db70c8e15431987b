"""The verb `package`: an artifact becomes what a serving target takes, and is tested."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifact import ASSETS, Artifact, is_artifact, write_golden
from deploykit.errors import PackageError
from deploykit.progress import Progress
from deploykit.staging import check_free, staged

if TYPE_CHECKING:
    from deploykit.serving.bundles import Bundle
    from deploykit.serving.package_plan import Plan, TargetOptions
    from deploykit.serving.package_targets import Written


def package(
    model: str | Path,
    output: str | Path,
    *,
    target: str,
    name: str | None = None,
    settings: str | Path | None = None,
    device: str | None = None,
    max_batch: int | None = None,
    min_cosine: float | None = None,
    options: TargetOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Write the files that a serving target takes, and replay the golden requests on the model among them.

    Args:
        model: An artifact; what `optimize` wrote stands for its winner.
        output: Directory that receives the files; must not exist.
        target: One of `serving.package_targets.TARGETS`.
        name: The model's name on the server; by default its directory's.
        settings: Tuned settings (`benchmark --tune --save-settings`); by default those that the artifact brings.
        device: Where the model is to run; by default the settings', else the target's first.
        max_batch: Most rows of requests that the server joins; 0 for none. By default what the model allows, which is
            tried out.
        min_cosine: Accept other values down to this cosine, for models whose numbers were changed on purpose.
        options: What only some targets take.
        progress: Told about steps.

    Returns:
        The bundle.

    Raises:
        PackageError: The target cannot have this model, or its answers are not the golden ones.
        OutputExistsError: Something stands at the output.
        ArtifactError: The artifact was changed.
    """
    from deploykit.serving import package_plan as planning
    from deploykit.serving.package_targets import find_target

    told = progress or Progress()
    chosen = find_target(target)
    options = options or planning.TargetOptions()
    chosen.check_options(options)
    check_free(Path(os.path.abspath(output)))  # noqa: PTH100 - resolve() would follow a link at the output
    first_note = len(told.notes)
    artifact = _open(Path(model))
    label = planning.check_name(name or Path(model).resolve().name)
    kept, tuned = planning.choose_settings(artifact, settings, device, chosen.runs, chosen.title, told)
    cases = planning.golden_cases(artifact)
    contract = planning.contract_of(artifact, min_cosine)
    inputs = planning.ranked(artifact.signature.inputs, cases[0][0])
    outputs = planning.ranked(artifact.signature.outputs, cases[0][1])
    if chosen.joins:
        with told.step("find out whether requests may be joined"):
            rows = planning.plan_batch(artifact, inputs, outputs, cases, contract, max_batch, kept, told)
    elif max_batch:
        raise PackageError(f"{chosen.title} does not join requests", hint="leave --max-batch out")
    else:
        rows = 0
    plan = planning.Plan(
        artifact, label, kept, tuned, rows, inputs, outputs, planning.fitting(cases, rows), contract, options
    )
    with staged(output) as folder:
        with told.step(f"write {chosen.title}"):
            written = chosen.write(plan, folder)
        with told.step(f"replay {len(plan.cases)} golden requests"):
            record = planning.replay(folder / written.model, kept, plan.cases, contract)
        if record["verdict"] == "not run":
            plan.notes.append(f"the golden requests were not replayed here: {record['reason']}")
        left = sorted(n.removeprefix(ASSETS) for n in artifact.manifest.files if n.startswith(ASSETS))
        if left and not any(folder.rglob(ASSETS.rstrip("/"))):
            plan.notes.append(
                f"clients need what the bundle does not hold: {', '.join(left[:5])} of the artifact's assets"
            )
        for note in plan.notes:
            told.note(note)
        _seal(folder, plan, written, target, record, told.notes[first_note:])
    from deploykit.serving.bundles import Bundle

    return Bundle.open(output)


def _open(path: Path) -> Artifact:
    if not is_artifact(path):
        source = f" {path} -o NAME" if path.suffix == ".onnx" else ""
        what = "does not exist" if not path.exists() else "is no artifact"
        raise PackageError(
            f"{path} {what}", expected="an artifact's directory, which holds golden requests",
            hint=f"make one: deploykit export{source}",
        )  # fmt: skip
    return Artifact.open(path)


def _seal(folder: Path, plan: Plan, written: Written, target: str, record: dict[str, Any], notes: list[str]) -> None:
    """Golden requests, bill of materials, README and manifest: what all bundles have."""
    from deploykit import __version__
    from deploykit.serving import bundles
    from deploykit.serving.package_lock import read_lock
    from deploykit.serving.sbom import FILE_NAME, as_json, bill_of_materials

    write_golden(folder / "golden.npz", plan.cases)
    lock = folder / "requirements.txt"
    pins = read_lock(lock) if target == "docker" else ()
    bill = bill_of_materials(plan.artifact, name=plan.name, packages=[(p.name, p.version, p.hashes) for p in pins])
    (folder / FILE_NAME).write_bytes(as_json(bill))
    (folder / bundles.README).write_text(_readme(plan, written, target, notes), encoding="utf-8")
    manifest = bundles.BundleManifest(
        deploykit=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=target,
        name=plan.name,
        protocol=written.protocol,
        artifact=plan.artifact.digest,
        model=written.model,
        inputs=bundles.tensor_entries(plan.inputs),
        outputs=bundles.tensor_entries(plan.outputs),
        columns=list(written.columns),
        max_batch=plan.max_batch,
        settings=plan.settings.as_dict(),
        contract=plan.contract,
        replay=record,
        notes=notes,
        files=bundles.entries_of(folder),
    )
    (folder / bundles.BUNDLE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _readme(plan: Plan, written: Written, target: str, notes: list[str]) -> str:
    joined = f"Requests are joined, up to {plan.max_batch} rows." if plan.max_batch > 1 else "Requests are not joined."
    tensors = "\n".join(
        f"- {kind} `{spec}`" for kind, specs in (("input", plan.inputs), ("output", plan.outputs)) for spec in specs
    )
    said = "".join(f"- {note}\n" for note in notes)
    return (
        f"# {plan.name} for {target}\n\n"
        f"Model: artifact `{plan.artifact.digest[:12]}`, to run on {plan.device}. {joined}\n\n{tensors}\n\n"
        f"## Start\n\n{written.readme}\n\n"
        "## Test\n\n"
        "The golden requests, in process and asked of the server:\n\n"
        "```\ndeploykit smoke .\ndeploykit smoke . --url http://127.0.0.1:PORT --wait 60\n```\n"
    ) + (f"\n## Notes\n\n{said}" if said else "")
