"""python -m sanitize"""

from sanitize.cli import main

if __name__ == "__main__":
    main()
