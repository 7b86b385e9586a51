"""`python -m heavyball.race` is the command `heavyball`."""

from heavyball.race import main

if __name__ == "__main__":
    main()
