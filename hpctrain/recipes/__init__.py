"""The rules of each recipe, one module a recipe with one pure function `resolve(context) ->
Resolved`."""
