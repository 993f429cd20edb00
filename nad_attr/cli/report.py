"""``nad-attr report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nad_attr.cli import options as opt
from nad_attr.cli.messages import UsageError, guarded, say
from nad_attr.cli.opening import Study, check_folder, check_outputs, chosen_device, finished
from nad_attr.cli.rivals import METHODS, check_methods, rivals_of
from nad_attr.evaluation import Evaluation
from nad_attr.report import Report
from nad_attr.running.options import RunOptions

__all__ = ["report"]

#: Images of each class that rivals score channels on, at most.
_MAX_SCORED_IMAGES = 50


def report(
    gates: opt.Store,
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="The page to write; an existing one is replaced.")
    ] = Path("report.html"),
    data: Annotated[
        str | None,
        typer.Option(
            help="Held-out images, as for evaluate: adds what is not in the file yet: measures, "
            "curves, mosaics, errors explained, and what channels respond to."
        ),
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help=f"Measure channels chosen by: {', '.join(METHODS)}; repeatable."
        ),
    ] = None,
    n_images: Annotated[
        int, typer.Option("--images", min=1, help="Held-out images, at most, evenly over classes.")
    ] = 1000,
    random: Annotated[int, typer.Option(min=0, help="Draws of random channels of equal size.")] = 3,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep what was measured in the file of the gates.")
    ] = False,
    measured: Annotated[
        str | None,
        typer.Option(
            "--evaluation",
            help="Which evaluation to show: its name in the file, or a .json file of evaluate.",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Title of the page; default: the model.")
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(help="Images that --with scores on; default: those gates were learned on."),
    ] = None,
    labels: opt.LabelTable = None,
    train_labels: opt.TrainLabelTable = None,
    *,
    network: opt.NetworkOptions,
    work: opt.WorkOptions,
) -> None:
    """Write one page that shows everything a file of gates says.

    The page is one file that needs no network. Without --data it shows what is in the file; with
    --data it measures the rest, on the network that the file names.

    Examples:
      nad-attr report gates.h5 --out report.html
      nad-attr report gates.h5 --data photos/val --out report.html --keep
      nad-attr report gates.h5 --data photos/val --with taylor --with neuron-mct
    """
    with guarded(work.debug, stopped=lambda: "No page was written."):
        methods = check_methods(rival)
        if methods and data is None:
            raise UsageError("--with needs --data: methods are measured on images.")
        if keep and data is None:
            raise UsageError("--keep needs --data: nothing is measured without images.")
        if labels is not None and data is None:
            raise UsageError("--labels needs --data, the folder of the images it names.")
        read = [gates, network.weights, work.class_index, labels, data, train_data, measured]
        check_outputs([(out, "text")], read)
        evaluation: Evaluation | str | None = measured
        if measured is not None and measured.endswith(".json"):
            evaluation = Evaluation.load(measured)
        result = Report(gates, evaluation=evaluation, title=title)
        if data is not None:
            run = RunOptions(device=chosen_device(work.device), batch_size=work.batch_size)
            check_folder(data, labels)
            study = Study(result.gates, result.provenance, network, work)
            images = study.images(data, labels, held_out=True)
            rivals = None
            if methods:
                training = study.training_images(train_data, train_labels, labels)
                archs = result.gates.sub_architectures()
                rivals = rivals_of(
                    study, methods, archs, training.data, n_images=_MAX_SCORED_IMAGES, run=run
                )
            result.measure(
                study.model,
                images.data,
                rivals=rivals,
                n_images=n_images,
                n_random=random,
                seed=work.seed,
                run=run,
                say=lambda text: say(text, work.quiet),
            )
            finished(images, work.quiet)
        for note in result.results.notes:
            say(note, work.quiet)
        result.save(out)
        if keep:
            say(f"kept in {gates}: {', '.join(result.keep())}", work.quiet)
        say(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)", work.quiet)
        missing = result.missing()
        if missing and data is None:
            say(f"not in it: {'; '.join(missing)}; --data adds most of it.", work.quiet)
