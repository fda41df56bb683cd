"""The status page at `/`: rendered here, readable without JavaScript, free of secrets."""

from __future__ import annotations

from flask import Blueprint, render_template

from atlas.api.health import detail
from atlas.api.openapi import describe
from atlas.api.state import state

blueprint = Blueprint("status", __name__, template_folder="templates")


@blueprint.get("/")
@describe({200: "text/html"})
def page() -> str:
    """The status page."""
    return render_template("status.html", health=detail(state()))
