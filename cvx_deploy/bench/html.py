"""The results of a benchmark as one HTML page that holds all it shows: no script, no font, no request."""

import json
from html import escape

from cvx_deploy.bench import plots
from cvx_deploy.bench.markdown import Table, tables, title
from cvx_deploy.bench.results import BenchResults

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 68rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
p { margin: .2rem 0 .7rem; color: #555; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .35rem .7rem .35rem 0; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { color: #555; font-weight: 600; } td:first-child { font-weight: 600; } th, td { white-space: nowrap; }
svg { width: 100%; max-width: 56rem; height: auto; display: block; font-family: inherit; }
svg text { font-family: system-ui, "DejaVu Sans", sans-serif !important; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; color: #555; }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser itself refuses any request


def page(results: BenchResults) -> str:
    """Return the page."""
    told = results.conditions
    taken = f"{told['date']}, {told['cpu']}, {told['cores']} cores; GPU: {told['gpu']}"
    first, *others = tables(results)
    body = [
        f"<h1>{escape(title(results))}</h1>",
        f"<p>{escape(taken)}</p>",
        _table(first),
        *_plot("Where the time goes", plots.latency(results)),
        *_plot("Memory over the last run", plots.memory(results)),
        *_plot("Quality against speed", plots.quality(results)),
        *map(_table, others),
    ]
    if results.not_measured:
        body += ["<h2>Not measured</h2>", _list(results.not_measured)]
    body += ["<h2>How the figures were taken</h2>", _list(results.methods)]
    body += ["<h2>Conditions</h2>", f"<pre>{escape(json.dumps(told, indent=2))}</pre>"]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title(results))}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _plot(heading: str, svg: str) -> list[str]:
    return [f"<h2>{escape(heading)}</h2>", svg]


def _table(table: Table) -> str:
    head, *rows = ([escape(cell).replace("`load`", "<code>load</code>") for cell in row] for row in table.rows)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    note = escape(table.note).replace("`load`", "<code>load</code>")
    return (
        f"<h2>{escape(table.title)}</h2><p>{note}</p>"
        f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _list(pairs: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in pairs.items())}</dl>"
