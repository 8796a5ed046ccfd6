"""One self-contained page per run: report.html. It reads only files of the run folder, at any time."""

from __future__ import annotations

from html import escape
from pathlib import Path

from vissl_like.files import write_text
from vissl_like.outputs import report_sections
from vissl_like.outputs.run_folder import REPORT_FILE, RunFolder, Section

STYLE_FILE = Path(__file__).with_name("report.css")


def write_report(run_dir: Path) -> Path:
    """Write RUN.DIR/report.html, and RUN.DIR/figures, from what the folder holds. Returns the page's path."""
    run = RunFolder(run_dir)
    sections = [section for make in report_sections.SECTIONS if (section := make(run)) is not None]
    page = _page(run, sections, headline=report_sections.headline(run))
    write_text(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def _page(run: RunFolder, sections: list[Section], *, headline: str) -> str:
    style, text = run.status
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    blocks = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{section.body}</section>'
        for section in sections
    )
    damaged = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(run.damaged))
    note = f'<section class="warn"><h2>Files that could not be read</h2><ul>{damaged}</ul></section>' if damaged else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(run.title)}</title>'
        f"<style>{STYLE_FILE.read_text(encoding='utf-8')}</style></head><body><main><header>"
        f'<p class="engine">{escape(run.engine.replace("_", " "))}</p><h1>{escape(run.title)}</h1>'
        f'<p><span class="pill {style}">{escape(text)}</span> {headline}</p>{_repeat(run)}</header>'
        f"<nav>{links}</nav>{blocks}{note}"
        f"<footer>vissl_like {escape(str(run.launch.get('version', '')))} · pictures lie in <code>figures/</code>, "
        f"every number in <code>metrics.jsonl</code> and <code>results.json</code>.</footer></main></body></html>\n"
    )


def _repeat(run: RunFolder) -> str:
    """How this run is repeated: its command line, or the pipeline that it is a stage of."""
    if run.stage:
        name = escape(run.path.resolve().parent.name)
        return f'<p>A stage of <a href="../{REPORT_FILE}">{name}</a>.</p>'
    return f"<pre>{escape(run.command_line)}</pre>" if run.command_line else ""
