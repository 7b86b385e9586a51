"""`python -m heavyball.race.bench` measures what optimizer steps cost, here and elsewhere."""
