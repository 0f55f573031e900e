"""One of several processes: `fails` at once, or else `waits` a minute for what never comes."""

import time

from absl import app

from launch import console, processes


def main(argv):
    with processes.leaving_on_error(), console.clear_errors(goes_on=True):
        processes.start()
        print("started", flush=True)
        if argv[1] == "fails":
            raise ValueError("x=1; allowed: 2")
        time.sleep(60)


if __name__ == "__main__":
    app.run(main)
