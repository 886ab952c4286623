"""Commands that list: normalizers, recipes."""

from __future__ import annotations

import typer

from softpick.cli.console import make_console

__all__ = ["normalizers", "recipes"]


def normalizers() -> None:
    """List the normalizers."""
    from rich.table import Table

    from softpick.normalizers import NORMALIZERS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("weight of key i", overflow="fold")
    table.add_column("note", overflow="fold")
    for norm in NORMALIZERS.values():
        table.add_row(norm.name, norm.formula, f"{norm.note} {norm.citation}", end_section=True)
    make_console(wide=True).print(table, markup=False)


def recipes(name: str = typer.Argument(None, help="Print all its fields.")) -> None:
    """List the recipes, or print one."""
    from rich.table import Table

    from softpick.training.recipes import RECIPES, get_recipe

    console = make_console(wide=True)
    if name is not None:
        for key, value in get_recipe(name).to_json().items():
            console.print(f"{key}={value}", markup=False, highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recipe", "parameters", "tokens", "data", ""):
        table.add_column(column)
    for make in RECIPES.values():
        recipe = make()
        table.add_row(
            recipe.name,
            f"{recipe.parameters / 1e6:,.1f} M",
            f"{recipe.tokens / 1e6:,.1f} M",
            recipe.data or "built-in",
            (make.__doc__ or "").splitlines()[0],
        )
    console.print(table, markup=False)
