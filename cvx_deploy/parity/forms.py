"""A parity check on disk: JSON, JUnit XML, Markdown, and frames side by side."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cvx_deploy.files import staged_file
from cvx_deploy.measure.difference import Video
from cvx_deploy.measure.thresholds import THRESHOLDS
from cvx_deploy.media.contact_sheet import ContactSheet
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.parity.ladder import MEANING, Parity, Rung, summaries

_MOST = 64.0


def write_report(parity: Parity, folder: Path) -> list[Path]:
    """Write ``check.json``, ``junit.xml`` and ``check.md`` into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "check.json": json.dumps(parity.as_dict(), indent=2) + "\n",
        "junit.xml": junit(parity),
        "check.md": markdown(parity),
    }
    for name, text in texts.items():
        with staged_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def junit(parity: Parity) -> str:
    """Return what CI servers read: a test suite for each rung, a test for each comparison."""
    root = ElementTree.Element("testsuites", name="cvx-deploy check")
    for rung in parity.rungs:
        counts = {
            "tests": max(len(rung.results), 1),
            "failures": len(rung.failures),
            "skipped": int(bool(rung.skipped)),
        }
        told = {"name": rung.name, **{name: str(count) for name, count in counts.items()}}
        suite = ElementTree.SubElement(root, "testsuite", told)
        if rung.skipped:
            test = ElementTree.SubElement(suite, "testcase", classname=rung.name, name=MEANING[rung.name])
            ElementTree.SubElement(test, "skipped", message=rung.skipped)
        for result in rung.results:
            test = ElementTree.SubElement(suite, "testcase", classname=rung.name, name=result.subject)
            if result.broken:
                ElementTree.SubElement(test, "failure", message=result.broken[0]).text = "\n".join(result.broken)
    _forecast_suite(root, parity)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _forecast_suite(root: ElementTree.Element, parity: Parity) -> None:
    """Add what was found of videos with steps forecast, where that was asked for."""
    if not parity.forecasts:
        return
    failures = sum(bool(one.broken) for one in parity.forecasts)
    told = {"name": "forecast", "tests": str(len(parity.forecasts)), "failures": str(failures), "skipped": "0"}
    suite = ElementTree.SubElement(root, "testsuite", told)
    for one in parity.forecasts:
        test = ElementTree.SubElement(suite, "testcase", classname="forecast", name=f"--fast at {one.shape}")
        if one.broken:
            ElementTree.SubElement(test, "failure", message=one.broken[0]).text = "\n".join(one.broken)


def markdown(parity: Parity) -> str:
    """Return the report for a person to read."""
    return "\n".join(_lines(parity)) + "\n"


def _lines(parity: Parity) -> Iterator[str]:
    verdict = parity.verdict[0].upper() + parity.verdict[1:]
    yield f"# Parity of `{parity.bundle}`"
    yield ""
    yield f"{verdict}." if parity.error is None else f"**{parity.error.what}.** {parity.error.fix}."
    yield ""
    yield from (line for one in parity.reduced for line in (f"{one}.", ""))
    yield f"Held against `{parity.checkpoint}` in diffusers, float32. Engine: {parity.engine}."
    for rung in parity.rungs:
        yield from _rung_lines(rung)
    if parity.forecasts:
        yield from ("", "## Steps forecast: against the engine's own full run, which is no parity", "")
        yield from (f"- {one}{': ' + '; '.join(one.broken) if one.broken else ''}" for one in parity.forecasts)
    yield from ("", "## Conditions", "", "```json", json.dumps(parity.conditions, indent=2), "```")


def _rung_lines(rung: Rung) -> Iterator[str]:
    yield from ("", f"## {rung.name}: {MEANING[rung.name]}", "")
    if rung.skipped:
        yield f"Skipped: {rung.skipped}."
        return
    yield f"Ran on {rung.runs_on}. " + (
        f"Limits of {rung.precision}: {THRESHOLDS[rung.precision].reason}."
        if rung.precision
        else "Measured, not judged."
    )
    yield from (f"\n{note}." for note in rung.notes)
    yield from ("", "| network | run | worst output | max abs | relative L2 | cosine | |")
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for result in rung.networks:
        worst = result.worst
        figures = (
            "| did not run | | | "
            if worst is None
            else (f"| {worst.output} | {worst.max_abs:.2e} | {worst.relative_l2:.2e} | {worst.cosine:.8f} ")
        )
        yield f"| {result.network} | {result.shape}, {result.case} {figures}| {'; '.join(result.broken) or 'ok'} |"
    yield ""
    yield from (f"- {line}" for line in summaries(rung) if line.startswith(("latents", "video")))
    yield from (f"- {result.subject}: {'; '.join(result.broken)}" for result in rung.trajectories if result.broken)


def save_frames(path: Path, eager: Video, engine: Video) -> float:
    """Write frames of diffusers' video above the engine's, their difference below, and return how it is amplified.

    Grey is no difference. It is amplified until its largest is seen in full, at most `_MOST` times.
    """
    frames, height, width, _ = eager.shape
    sheet = ContactSheet(VideoFormat(frames, height, width, fps=1, videos=3))
    change = engine - eager
    factor = float(min(0.5 / max(float(np.abs(change).max()), 1e-9), _MOST))
    for video in (eager, engine, np.clip(0.5 + factor * change, 0, 1).astype(np.float32)):
        sheet.add(video)
    sheet.save(path)
    return factor
