"""One self-contained HTML document: escaping, and a policy that lets nothing in or out."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from importlib.resources import files
from typing import Any

from safeproj.text import printable

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="safeproj {version}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
{body}
<script type="application/json" id="record">{record}</script>
{scripts}
</body>
</html>
"""


def text(value: object) -> str:
    r"""Return a value as HTML text or the value of an attribute.

    Characters that are not printable become escapes: among them are those that turn the direction
    of writing and so make a name look like another.

    >>> text('<b>"a"' + chr(0x202E))
    '&lt;b&gt;&quot;a&quot;\\u202e'
    """
    return html.escape(printable(str(value)), quote=True)


def data(value: Any) -> str:
    r"""Return a value as JSON that can stand in a script element.

    >>> data({"a": "</script>&"})
    '{"a":"\\u003c/script\\u003e\\u0026"}'
    """
    dumped = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return dumped


def _finite(value: Any) -> Any:
    """Return a value with nothing in the place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def document(title: str, version: str, body: str, record: Any, libraries: list[str]) -> str:
    """Return the whole file.

    Args:
        title: of the page, not yet escaped.
        version: of safeproj.
        body: HTML.
        record: what the script of the page reads.
        libraries: scripts that the script of the page needs.
    """
    scripts = [*libraries, _resource("page.js")]
    return _TEMPLATE.format(
        policy=_policy(scripts),
        version=text(version),
        title=text(title),
        style=_resource("page.css"),
        body=body,
        record=data(record),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _policy(scripts: list[str]) -> str:
    """Return the Content-Security-Policy: these scripts and no others, and no request at all.

    Styles are inline because the charts set them element by element.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    sources = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return files("safeproj.report.html_page").joinpath(name).read_text(encoding="utf-8")
