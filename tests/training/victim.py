"""A process whose children train, and die as they are told: the other side of test_faults.py.

It loads a family's tiny base once and then, for every line of JSON on its standard input, forks a
child that trains in the folder named; a line of JSON on its standard output tells how the child
ended. The children are real processes, killed with SIGKILL; nothing of the library is replaced.
"""

import errno
import json
import logging
import os
import resource
import select
import signal
import sys
import traceback

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child has no thread pool
os.environ["HF_HUB_OFFLINE"] = "1"


import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example

FILE_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def main() -> None:
    model, processor = iq.tiny.load_model(family=sys.argv[1], device="cpu")
    cards = iq.tiny.creature_cards(10, seed=0)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        log = open(order["log"], "ab")  # noqa: SIM115 - the child's
        ended, child_end = os.pipe()  # readable once the child has ended
        child = os.fork()
        if child == 0:
            os.close(ended)
            os.dup2(log.fileno(), 2)
            os._exit(train(order, model, processor, cards))
        os.close(child_end)
        log.close()
        patience = order.get("kill_after_s")
        if patience is not None and not select.select([ended], [], [], patience)[0]:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(ended)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def train(order: dict, model, processor, cards: list) -> int:
    """What a user's script does; the exit code."""
    logging.basicConfig(level=logging.WARNING)
    operations: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        opened = event == "open" and str(arguments[0]).startswith(order["output_dir"])
        if not opened and event not in FILE_EVENTS:
            return
        # Such as "os.rename .checkpoint-3.incomplete"
        operation = f"{event} {os.fsdecode(arguments[0]).removeprefix(order['output_dir'] + '/')}"
        operations.append(operation)
        if len(operations) == order.get("kill_at_event"):
            os.kill(os.getpid(), signal.SIGKILL)
        if operation in order.get("disk_full", ()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)
    if "file_size_limit" in order:
        limit = order["file_size_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        config = iq.TrainConfig(output_dir=order["output_dir"], **order["config"])
        result = iq.train(
            iq.add_lora(model),
            processor,
            cards,
            cards[:2],
            config=config,
            to_example=pokemon_card_example,
        )
        with open(order["report"], "w") as file:
            json.dump({"step": result.global_step, "operations": operations}, file)
        return 0
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    main()
