"""The tasks of MetaWorld v3 and what the policy is told to do in each, in several wordings.

The sentences are fieldtune's own, after the table of tasks in the appendix of "Meta-World: A Benchmark and Evaluation
for Multi-Task and Meta Reinforcement Learning" (arXiv 1910.10897); MetaWorld itself has no instructions.

The wordings in `HELD_OUT` are for evaluation alone, to see whether a policy understands an instruction or has learned
six sentences by heart. Each has another verb or another order than the task's own wordings in `TRAINING`, and still
says which of the fifty tasks is meant. All of their words occur in `TRAINING`, in the wording of some task: the
small policy learns its words from nothing but these sentences, so it can put known words together anew, but it cannot
know a word that it never saw. One that is trained on a few of the tasks does meet some new words.
"""

from __future__ import annotations


def _wordings(by_task: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Task -> its sentences, from one string a task with semicolons between them."""
    return {task: tuple(sentences.split("; ")) for task, sentences in by_task.items()}


TRAINING: dict[str, tuple[str, ...]] = _wordings(
    {
        "assembly-v3": "pick up the nut and place it onto the peg; put the nut onto the peg; "
        "fit the nut over the peg; lift the nut and lower it over the peg; take the nut and set it on the peg; "
        "slip the nut down over the peg",
        "basketball-v3": "dunk the basketball into the basket; put the basketball through the hoop; "
        "take the basketball and drop it into the basket; score with the basketball; "
        "lift the basketball and let it fall through the hoop; get the basketball into the hoop",
        "bin-picking-v3": "grasp the puck in one bin and place it into the other bin; move the puck to the other bin; "
        "take the puck out of its bin and put it into the other; lift the puck from one bin over to the other bin; "
        "transfer the puck between the bins; carry the puck across into the second bin",
        "box-close-v3": "grasp the cover and close the box with it; put the cover on the box; cover the box; "
        "shut the box with its lid; pick up the lid and set it onto the box; close the box by placing the lid on top",
        "button-press-topdown-v3": "press the button from the top; push the button down from above; "
        "press down on the button; come from above and press the button; lower the gripper onto the button; "
        "reach over the button and push it down",
        "button-press-topdown-wall-v3": "bypass the wall and press the button from the top; "
        "go over the wall and push the button down; get past the wall, then press down on the button; "
        "avoid the wall and press the button from above; press the button behind the wall from the top; "
        "reach around the wall and push the button down from above",
        "button-press-v3": "press the button; push the button in; press the button from the front; "
        "go to the button and press it in; move forward and push the button; use the gripper to press the front button",
        "button-press-wall-v3": "bypass the wall and press the button; go around the wall and push the button in; "
        "get past the wall, then press the button from the front; avoid the wall and push the button; "
        "press in the button behind the wall; reach the button behind the wall and push it in",
        "coffee-button-v3": "push the button on the coffee machine; press the button of the coffee machine; "
        "start the coffee machine; switch the coffee machine on; press the coffee button; "
        "turn on the coffee machine with its button",
        "coffee-pull-v3": "pull the mug away from the coffee machine; take the mug from the coffee machine; "
        "pull the coffee mug out; move the mug out from under the coffee machine; drag the mug away from the machine; "
        "get the mug back from the coffee machine",
        "coffee-push-v3": "push the mug under the coffee machine; slide the mug below the coffee machine; "
        "move the coffee mug into the machine; place the mug under the coffee machine; "
        "bring the mug to the coffee machine; push the coffee mug forward to the machine",
        "dial-turn-v3": "rotate the dial; turn the dial; turn the dial around; move the dial round with the gripper; "
        "give the dial a turn; spin the dial",
        "disassemble-v3": "pick the nut off the peg; take the nut off the peg; remove the nut from the peg; "
        "lift the nut up from the peg; pull the nut off the peg; grasp the nut and raise it off the peg",
        "door-close-v3": "close the door; push the door closed; shut the door; swing the door shut; "
        "move the door until it is closed; the door is open, close it",
        "door-lock-v3": "lock the door by rotating the lock clockwise; lock the door; turn the lock clockwise; "
        "rotate the lock of the door to lock it; make the door locked; twist the door lock clockwise",
        "door-open-v3": "open the door with its handle; open the door; pull the door open; swing the door open; "
        "grasp the door handle and open it; pull on the handle to open the door",
        "door-unlock-v3": "unlock the door by rotating the lock counter-clockwise; unlock the door; "
        "turn the lock counter-clockwise; rotate the lock of the door to unlock it; make the door unlocked; "
        "twist the door lock counter-clockwise",
        "drawer-close-v3": "push the drawer closed; close the drawer; shut the drawer; push the drawer in; "
        "slide the drawer shut; the drawer is open, close it",
        "drawer-open-v3": "pull the drawer open; open the drawer; pull the drawer out; slide the drawer open; "
        "grasp the drawer handle and pull; the drawer is closed, open it",
        "faucet-close-v3": "rotate the faucet clockwise; close the faucet; turn the faucet off; "
        "turn the faucet clockwise; shut off the water at the faucet; twist the faucet closed",
        "faucet-open-v3": "rotate the faucet counter-clockwise; open the faucet; turn the faucet on; "
        "turn the faucet counter-clockwise; let the water run from the faucet; twist the faucet open",
        "hammer-v3": "hammer the screw into the wall; take the hammer and hit the screw; "
        "drive the screw into the wall with the hammer; pick up the hammer and knock the screw in; "
        "the screw must go into the wall, use the hammer; hit the screw with the hammer",
        "hand-insert-v3": "insert the gripper into the hole; put the hand into the hole; "
        "lower the gripper into the hole; move your hand down into the hole; reach into the hole; "
        "stick the gripper into the hole",
        "handle-press-side-v3": "press the handle down sideways; push the side handle down; "
        "press the handle on the side down; lower the side handle; push down the handle at the side; "
        "press down on the sideways handle",
        "handle-press-v3": "press the handle down; push the handle down; lower the handle; press down on the handle; "
        "move the handle downwards; use the gripper to push down the handle",
        "handle-pull-side-v3": "pull the handle up sideways; lift the side handle; pull the handle on the side up; "
        "raise the side handle; pull up the handle at the side; pull up on the sideways handle",
        "handle-pull-v3": "pull the handle up; lift the handle; raise the handle; pull up on the handle; "
        "move the handle upwards; use the gripper to lift up the handle",
        "lever-pull-v3": "pull the lever up; lift the lever; raise the lever; move the lever upwards; "
        "swing the lever up; pull up on the lever",
        "peg-insert-side-v3": "insert the peg into the hole in the side of the box; put the peg into the box; "
        "pick up the peg and push it into the hole; plug the peg into the side of the box; "
        "stick the peg in the hole of the box; fit the peg into the hole from the side",
        "peg-unplug-side-v3": "unplug the peg from the side of the box; pull the peg out of the box; "
        "remove the peg from the hole; take the peg out of the hole in the box; "
        "pull the peg sideways out of the hole; unplug the peg",
        "pick-out-of-hole-v3": "pick the puck out of the hole; take the puck out of the hole; "
        "lift the puck from the hole; get the puck out of the hole and carry it to the goal; "
        "remove the puck from the hole; grasp the puck in the hole and raise it",
        "pick-place-v3": "pick up the puck and place it at the goal; grasp the puck and carry it to the goal; "
        "lift the puck to the goal; pick the puck up and hold it at the target; "
        "take the puck and bring it to the goal; raise the puck to the target",
        "pick-place-wall-v3": "pick up the puck, bypass the wall and place it at the goal; "
        "lift the puck over the wall to the goal; carry the puck past the wall and place it at the target; "
        "grasp the puck and bring it over the wall; pick the puck up and take it to the goal behind the wall; "
        "raise the puck across the wall to the target",
        "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet; "
        "pull the plate out of the cabinet sideways; move the plate to the side, out of the cabinet; "
        "drag the plate out of the cabinet to the side; take the plate out of the cabinet through the side; "
        "get the plate out of the cabinet from the side",
        "plate-slide-back-v3": "slide the plate back out of the cabinet; pull the plate back out of the cabinet; "
        "move the plate backwards out of the cabinet; drag the plate back from the cabinet; "
        "take the plate out of the cabinet to the front; get the plate back out of the cabinet",
        "plate-slide-side-v3": "slide the plate sideways into the cabinet; push the plate into the cabinet sideways; "
        "move the plate to the side, into the cabinet; push the plate into the cabinet from the side; "
        "bring the plate into the cabinet through the side; get the plate into the cabinet from the side",
        "plate-slide-v3": "slide the plate into the cabinet; push the plate into the cabinet; "
        "move the plate forward into the cabinet; put the plate away in the cabinet; "
        "push the plate straight into the cabinet; get the plate into the cabinet",
        "push-back-v3": "pull the puck back to the goal; drag the puck back to the goal; "
        "move the puck backwards to the target; slide the puck back towards you to the goal; "
        "bring the puck back along the table to the goal; push the puck backwards onto the goal",
        "push-v3": "push the puck to the goal; slide the puck to the goal; move the puck along the table to the goal; "
        "push the puck onto the target; push the puck forward to the target; shove the puck to the goal",
        "push-wall-v3": "bypass the wall and push the puck to the goal; push the puck around the wall to the goal; "
        "slide the puck past the wall onto the target; move the puck along the table around the wall to the goal; "
        "avoid the wall and push the puck to the target; push the puck to the goal behind the wall",
        "reach-v3": "reach the goal with the gripper; move the gripper to the goal; go to the goal; "
        "bring the hand to the target; get the gripper to the target; reach for the goal",
        "reach-wall-v3": "bypass the wall and reach the goal with the gripper; "
        "move the gripper over the wall to the goal; go around the wall to the goal; "
        "bring the hand past the wall to the target; reach the goal behind the wall; "
        "avoid the wall and put the gripper at the target",
        "shelf-place-v3": "pick up the puck and place it onto the shelf; put the puck on the shelf; "
        "lift the puck onto the shelf; take the puck and set it on the shelf; move the puck up to the shelf; "
        "carry the puck over to the shelf",
        "soccer-v3": "kick the ball into the soccer goal; push the ball into the net; "
        "the ball goes into the net, kick it; shoot the ball into the goal; move the soccer ball into the net; "
        "roll the ball into the soccer goal",
        "stick-pull-v3": "grasp the stick and pull the box with it; pull the box with the stick; "
        "take the stick and drag the box back; use the stick to pull the box; "
        "pick up the stick, hook the box and pull; bring the box back by means of the stick",
        "stick-push-v3": "grasp the stick and push the box with it; push the box with the stick; "
        "take the stick and shove the box forward; use the stick to push the box; "
        "pick up the stick and push the box away; move the box forward by means of the stick",
        "sweep-into-v3": "sweep the puck into the hole; push the puck into the hole; move the puck into the hole; "
        "drop the puck into the hole; slide the puck along the table into the hole; make the puck fall into the hole",
        "sweep-v3": "sweep the puck off the table; push the puck off the table; move the puck off the table; "
        "slide the puck over the edge of the table; clear the puck from the table; make the puck fall off the table",
        "window-close-v3": "push the window closed; close the window; shut the window; slide the window shut; "
        "move the window until it is closed; the window is open, close it",
        "window-open-v3": "push the window open; open the window; slide the window open; "
        "move the window until it is open; pull the window open by its handle; the window is closed, open it",
    }
)
"""Wordings by task, for all of MT50; the first is the canonical one."""

HELD_OUT: dict[str, tuple[str, ...]] = _wordings(
    {
        "assembly-v3": "drop the nut onto the peg; place the nut over the peg; the nut goes on the peg",
        "basketball-v3": "shoot the basketball into the hoop; carry the basketball over to the basket; "
        "the basketball goes through the hoop",
        "bin-picking-v3": "pick the puck up and drop it in the second bin; "
        "bring the puck out of one bin into the second; the puck goes into the other bin",
        "box-close-v3": "lower the lid onto the box; place the cover over the box; the lid goes on top of the box",
        "button-press-topdown-v3": "hit the button from above; the button must go down, press on its top; "
        "bring the hand down on top of the button",
        "button-press-topdown-wall-v3": "behind the wall is a button, press it down from above; "
        "hit the button past the wall from the top; clear the wall and lower the gripper onto the button",
        "button-press-v3": "hit the button from the front; bring the hand forward into the button; "
        "the button must go in, press it",
        "button-press-wall-v3": "behind the wall is a button, push it in; "
        "hit the button past the wall from the front; clear the wall and press the button in",
        "coffee-button-v3": "make the coffee machine run; hit the button of the coffee machine; "
        "use the button to start the coffee",
        "coffee-pull-v3": "slide the mug back, away from the coffee machine; remove the mug from the coffee machine; "
        "bring the coffee mug back to you",
        "coffee-push-v3": "get the mug under the coffee machine; shove the coffee mug below the machine; "
        "the mug goes under the coffee machine",
        "dial-turn-v3": "twist the dial; make the dial spin round; swing the dial around with the hand",
        "disassemble-v3": "get the nut off the peg; raise the nut up from the peg; slip the nut off the peg",
        "door-close-v3": "get the door shut; make the door close; shut the open door with a push",
        "door-lock-v3": "get the door locked; clockwise, turn the door lock; use the lock to lock up the door",
        "door-open-v3": "get the door open; use the handle to swing the door open; the door is closed, open it",
        "door-unlock-v3": "get the door unlocked; counter-clockwise, turn the door lock; the door is locked, unlock it",
        "drawer-close-v3": "get the drawer shut; move the drawer in until it is closed; shove the drawer closed",
        "drawer-open-v3": "get the drawer open; drag the drawer out by its handle; "
        "move the drawer out until it is open",
        "faucet-close-v3": "switch the faucet off; spin the faucet clockwise; the faucet is open, close it",
        "faucet-open-v3": "switch the faucet on; spin the faucet counter-clockwise; the faucet is closed, open it",
        "hammer-v3": "knock the screw into the wall; grasp the hammer and drive in the screw; "
        "with the hammer, push the screw into the wall",
        "hand-insert-v3": "bring the hand down into the hole; place the gripper in the hole; "
        "the gripper goes into the hole",
        "handle-press-side-v3": "move the side handle downwards; at the side is a handle, press it down; "
        "bring down the handle on the side",
        "handle-press-v3": "bring the handle down; the handle must go down; shove the handle downwards",
        "handle-pull-side-v3": "move the side handle upwards; at the side is a handle, pull it up; "
        "bring up the handle on the side",
        "handle-pull-v3": "bring the handle up; the handle must go up; drag the handle upwards",
        "lever-pull-v3": "bring the lever up; the lever must go up; drag the lever upwards",
        "peg-insert-side-v3": "slide the peg into the side of the box; move the peg into the hole of the box; "
        "the peg goes into the hole in the box",
        "peg-unplug-side-v3": "drag the peg out of the side of the box; get the peg out of the hole; "
        "the peg must come out of the box",
        "pick-out-of-hole-v3": "raise the puck out of the hole; pull the puck up from the hole; "
        "the puck is in the hole, take it out",
        "pick-place-v3": "carry the puck up to the target; raise the puck and move it to the goal; "
        "hold the puck up at the goal",
        "pick-place-wall-v3": "move the puck over the wall and hold it at the goal; "
        "behind the wall is the goal, carry the puck to it; get the puck up across the wall to the target",
        "plate-slide-back-side-v3": "shove the plate sideways out of the cabinet; "
        "out of the cabinet to the side, bring the plate; remove the plate from the cabinet through the side",
        "plate-slide-back-v3": "bring the plate back out of the cabinet; "
        "shove the plate backwards, out of the cabinet; remove the plate from the cabinet to the front",
        "plate-slide-side-v3": "shove the plate sideways into the cabinet; "
        "into the cabinet from the side, bring the plate; put the plate into the cabinet through the side",
        "plate-slide-v3": "shove the plate forward into the cabinet; the plate goes straight into the cabinet; "
        "bring the plate forward into the cabinet",
        "push-back-v3": "shove the puck backwards to the goal; get the puck back to the target; "
        "back towards you, drag the puck onto the target",
        "push-v3": "bring the puck to the goal along the table; shove the puck forward onto the goal; "
        "get the puck to the target with a push",
        "push-wall-v3": "shove the puck past the wall to the goal; behind the wall is the goal, push the puck to it; "
        "bring the puck along the table past the wall to the target",
        "reach-v3": "get the hand to the goal; the gripper must go to the target; go and hold the gripper at the goal",
        "reach-wall-v3": "get the hand around the wall to the goal; behind the wall is the target, go to it; "
        "clear the wall and bring the gripper to the goal",
        "shelf-place-v3": "bring the puck up onto the shelf; raise the puck to the shelf; the puck goes on the shelf",
        "soccer-v3": "knock the ball into the net; get the soccer ball into the goal; "
        "make the ball roll into the soccer goal",
        "stick-pull-v3": "with the stick, drag the box back; hold the stick and pull the box towards you; "
        "get the box back, use the stick",
        "stick-push-v3": "with the stick, shove the box away; hold the stick and push the box forward; "
        "drive the box forward, use the stick",
        "sweep-into-v3": "get the puck into the hole; shove the puck over the table into the hole; "
        "the puck goes into the hole",
        "sweep-v3": "get the puck off the table; shove the puck over the table edge; remove the puck from the table",
        "window-close-v3": "get the window shut; make the window close; shove the window until it is closed",
        "window-open-v3": "get the window open; make the window open; shove the window until it is open",
    }
)
"""Three more wordings of each task, never to be trained on."""

MT10: tuple[str, ...] = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
"""The ten tasks of MetaWorld's MT10, in its order."""

MT50: tuple[str, ...] = tuple(TRAINING)
"""All fifty tasks."""

MT40: tuple[str, ...] = tuple(task for task in MT50 if task not in MT10)
"""The forty tasks of MT50 that are not in MT10: what a policy may have learned before it sees MT10."""

_MEDIUM = (
    "basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep sweep-into"
)
_HARD = "assembly hand-insert pick-out-of-hole pick-place push push-back"
_VERY_HARD = "shelf-place disassemble stick-pull stick-push pick-place-wall"
_NOT_EASY = {
    f"{task}-v3": difficulty
    for difficulty, tasks in (("medium", _MEDIUM), ("hard", _HARD), ("very hard", _VERY_HARD))
    for task in tasks.split()
}
DIFFICULTY: dict[str, str] = {task: _NOT_EASY.get(task, "easy") for task in MT50}
"""Task -> easy, medium, hard or very hard, by which success on MT50 is usually told (Seo et al., arXiv 2206.14244)."""

GROUPS: dict[str, tuple[str, ...]] = {"mt10": MT10, "mt40": MT40, "mt50": MT50}
"""Words that stand for a list of tasks in a configuration."""
