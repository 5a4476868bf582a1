"""``GET /``: the status page, and what it is made of. Nothing comes from elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from kvpsi.serving import page

router = APIRouter(include_in_schema=False)
_FOLDER = Path(page.__file__).parent
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_A_DAY = {"Cache-Control": "public, max-age=86400"}


@router.get("/")
@router.head("/")
async def index() -> Response:
    """The page itself."""
    return FileResponse(_FOLDER / "index.html", media_type="text/html; charset=utf-8")


@router.get("/page/plotly.js")
async def charts() -> Response:
    """The chart library, out of its Python package, which is not imported."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        return Response("the package plotly is not installed", 404)
    file = Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return FileResponse(file, media_type="text/javascript", headers=_A_DAY)


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A style or a script."""
    file = _FOLDER / name
    if file.suffix not in _KINDS or file.parent != _FOLDER or not file.is_file():
        return Response("there is no such file", 404)
    return FileResponse(file, media_type=f"{_KINDS[file.suffix]}; charset=utf-8")


@router.get("/favicon.ico")
async def icon() -> Response:
    """The icon."""
    return FileResponse(_FOLDER / "icon.svg", media_type=_KINDS[".svg"])
