"""Start, watch, stop and resume trainings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from counterpoint import catalog, data
from counterpoint.engine.run import Run, check_new
from counterpoint.errors import CounterpointError, unknown
from counterpoint.experiment import Experiment
from counterpoint.files import quoted
from counterpoint.report.run import options
from counterpoint.serve.jobs import Job
from counterpoint.serve.showing import Site, changing, environment, field, reading, shown
from counterpoint.systems.settings import flat, setting_value

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
SETTING = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


def routes(site: Site) -> list[Route]:
    """Make the routes of trainings."""
    return [
        reading(site, "/train", lambda request: form_page(site, request)),
        reading(site, "/job/{name}", lambda request: one(site, request)),
        reading(site, "/job/{name}/log", lambda request: log(site, request)),
        changing(site, "/train", lambda request, form: start(site, request, form)),
        changing(site, "/stop", lambda request, form: stop(site, form)),
        changing(site, "/resume", lambda request, form: resume(site, form)),
    ]


def form_page(site: Site, request: Request, form: Mapping[str, Any] | None = None, error: str = "") -> Response:
    """Show the form that starts a training, and the trainings so far."""
    names = ("system", "data", "name", "epochs", "seed", "settings")
    kept = {name: field(form, name) if form is not None else request.query_params.get(name, "") for name in names}
    systems = [(entry.slug, entry.title) for entry in catalog.entries().values() if entry.built and not entry.addition]
    running = {job.name: site.jobs.running(job) for job in site.jobs.all()}
    jobs = [(job, running.get(job.name, False)) for job in site.jobs.all()]  # read again: an end was written just now
    return shown(
        site,
        request,
        "train.html",
        status=400 if error else 200,
        systems=systems,
        sources=sorted(data.SOURCES),
        kept=kept,
        jobs=jobs,
        error=error,
        out=str(site.jobs.out),
    )


def start(site: Site, request: Request, form: Mapping[str, Any]) -> Response:
    """Check the form, start the training, and show its page. The form comes back with the reason where it is wrong."""
    try:
        name, words = command(site, form)
        job = site.jobs.start(name, words, site.jobs.out / name)
    except CounterpointError as error:
        return form_page(site, request, form, str(error))
    site.walk.forget()
    return RedirectResponse(f"/job/{job.name}", 303)


def command(site: Site, form: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the name of a new run and the words of its command. CounterpointError for what the command would reject.

    Only settings of the system are accepted, no other options. Paths in them must lie in the server's folders.
    """
    slug, source = field(form, "system"), field(form, "data")
    if not catalog.get(slug).built:
        raise CounterpointError(f"{slug} cannot be trained yet")
    if source and data.source_name(source) not in data.SOURCES:
        raise unknown("data source", data.source_name(source), data.SOURCES)
    overrides = settings(field(form, "settings"))
    if epochs := field(form, "epochs"):
        overrides["epochs"] = setting_value(epochs)
    for value in (source, *map(str, overrides.values())):
        site.places.check_words(value)
    seed = field(form, "seed", "0") or "0"
    if not re.fullmatch(r"\d{1,9}", seed):
        raise CounterpointError(f"the seed is a whole number from 0, got '{seed}'")
    known = flat(Experiment.resolve(slug, source or None, check=False).config)
    overrides = {key: fitting(key, value, known.get(key)) for key, value in overrides.items()}
    try:
        experiment = Experiment.resolve(slug, source or None, overrides=overrides)
    except (TypeError, ValueError) as error:  # a value of a type that the system's own check does not expect
        raise CounterpointError(
            f"a setting has a value of another type ({error}); see counterpoint train {slug} --help"
        ) from error
    name = field(form, "name") or _free(site, slug)
    if not NAME.fullmatch(name):
        raise CounterpointError(
            "a name has letters, digits, '-', '_' and '.', at most 80, and begins with a letter or digit"
        )
    check_new(site.jobs.out, name)
    words = ["train", slug, "--data", experiment.data, "--seed", seed, "--out", str(site.jobs.out), "--name", name]
    return name, [*words, *shlex.split(" ".join(options(overrides, slug)))]


def settings(text: str) -> dict[str, Any]:
    """Parse NAME=VALUE, a line each; values as YAML reads them. CounterpointError for another form."""
    found: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, sign, value = (part.strip() for part in line.partition("="))
        if not sign or not SETTING.fullmatch(name):
            raise CounterpointError(f"settings are lines NAME=VALUE, such as temperature=0.1; got '{line[:80]}'")
        try:
            found[name.replace("-", "_")] = setting_value(value)
        except CounterpointError as error:
            raise CounterpointError(f"{name}: {error}") from error
    return found


def fitting(name: str, value: Any, default: Any) -> Any:
    """Return a setting's value in the type of its default. CounterpointError where it has another type."""
    kind = type(default)
    if kind is bool or not isinstance(default, bool | int | float | str):
        fits = kind is not bool or isinstance(value, bool)
    elif kind is str:
        value, fits = (value if isinstance(value, str) else str(value)), not isinstance(value, list | dict)
    else:
        fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits:
        raise CounterpointError(f"{name} is {_KINDS[kind]}, such as {default}; got {value!r}")
    return value


def _free(site: Site, slug: str) -> str:
    """Return a name that no run and no training has: the system's with a number."""
    number = 1
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", slug)
    taken = {job.name for job in site.jobs.all()}
    while f"{stem}-{number}" in taken or (site.jobs.out / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def stop(site: Site, form: Mapping[str, Any]) -> Response:
    """Ask a training to stop."""
    job = site.jobs.stop(field(form, "name"))
    return RedirectResponse(f"/job/{job.name}", 303)


def resume(site: Site, form: Mapping[str, Any]) -> Response:
    """Continue an interrupted run of the folder in which runs are made."""
    run = Run.open(site.places.path(field(form, "run")))
    if run.path.parent != site.jobs.out or not NAME.fullmatch(run.path.name):
        raise CounterpointError(
            f"only runs in {site.jobs.out} can be resumed here: counterpoint train --resume {quoted(run.path)}"
        )
    if not run.checkpoint.is_file():
        raise CounterpointError(f"{run.path.name} has no checkpoint to resume")
    job = site.jobs.start(run.path.name, ["train", "--resume", str(run.path)], run.path)
    site.walk.forget()
    return RedirectResponse(f"/job/{job.name}", 303)


def one(site: Site, request: Request) -> Response:
    """Show a training: its command, its log as it grows, and a button that stops it."""
    job = site.jobs.get(str(request.path_params["name"]))
    alive = site.jobs.running(job)
    return shown(
        site,
        request,
        "job.html",
        job=job,
        alive=alive,
        key=_key(site, job),
        log=_log(site, job),
        stamp=_stamp(site, job),
    )


def log(site: Site, request: Request) -> Response:
    """Return the changing part of a training's page. Answer 204 where nothing changed."""
    job = site.jobs.get(str(request.path_params["name"]))
    stamp = _stamp(site, job)
    headers = {"x-stamp": stamp} | ({} if site.jobs.running(job) else {"x-done": "1"})
    if stamp == request.query_params.get("stamp"):
        return Response(status_code=204, headers=headers)
    return Response(_log(site, job), media_type="text/html", headers=headers)


def _key(site: Site, job: Job) -> str | None:
    return site.places.key(job.run) if site.places.holds(f"{job.run}/config.yaml") else None


def _stamp(site: Site, job: Job) -> str:
    size = job.log.stat().st_size if job.log.is_file() else 0
    return f"{site.jobs.running(job)}-{size}-{job.asked}-{_key(site, job) is not None}"


def _log(site: Site, job: Job) -> str:
    """Render the state, the buttons and the log."""
    key = _key(site, job)
    job = site.jobs.get(job.name)  # with its exit code
    return (
        environment()
        .get_template("log.html")
        .render(
            job=job,
            alive=site.jobs.running(job),
            key=key,
            resumable=key is not None and Run.open(job.run).checkpoint.is_file(),
            text=site.jobs.tail(job),
            form_token=site.guard.form_token,
        )
    )
