"""Balances a pole on a cart from episode returns alone: EGGROLL as direct policy search.

    python examples/python/cartpole_eggroll.py [--seed 0] [--generations 80]

A policy observation - 16 - action (tanh, greedy) plays gymnasium's CartPole-v1. Every generation 64 perturbed policies
play two episodes each, all 128 at once in tensors; Adam takes the pseudo-gradient of the mean return. The program
stops when the unperturbed policy reaches the goal over 20 episodes. Where gymnasium is installed, it then plays 20
episodes in its environment too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
from common import print_table
from torch import Tensor, nn

from torch_ext.nn import eggroll_convert
from torch_ext.optim import Eggroll

STEPS = 500  # of an episode, as in CartPole-v1


class CartPole:
    """Many carts at once: CartPole-v1's equations (Barto, Sutton and Anderson 1983), Euler steps of 0.02 s."""

    def __init__(self, carts: int, generator: torch.Generator) -> None:
        self.state = torch.rand(carts, 4, generator=generator) * 0.1 - 0.05
        self.alive = torch.ones(carts, dtype=torch.bool)

    def step(self, action: Tensor) -> Tensor:
        """Pushes left (0) or right (1); the reward of every cart: 1 while its pole stands."""
        x, speed, angle, turn = self.state.unbind(1)
        force = action * 20.0 - 10.0
        sine, cosine = angle.sin(), angle.cos()
        push = (force + 0.05 * turn**2 * sine) / 1.1
        angular = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        linear = push - 0.05 * angular * cosine / 1.1
        self.state = self.state + 0.02 * torch.stack([speed, linear, turn, angular], 1)
        reward = self.alive.float()
        x, angle = self.state[:, 0], self.state[:, 2]
        self.alive &= (x.abs() <= 2.4) & (angle.abs() <= 12 * math.pi / 180)
        return reward


def play(policy: nn.Module, members: int, episodes: int, generator: torch.Generator) -> Tensor:
    """Mean return of each member over its episodes, [members]."""
    carts = CartPole(members * episodes, generator)
    total = torch.zeros(members * episodes)
    for _ in range(STEPS):
        action = policy(carts.state.view(members, episodes, 4)).argmax(2).view(-1)
        total += carts.step(action)
        if not bool(carts.alive.any()):
            break
    return total.view(members, episodes).mean(1)


@torch.no_grad()
def train(seed: int, generations: int, goal: float = 475.0, population: int = 64) -> tuple[nn.Module, list[float]]:
    """The policy and the return of the unperturbed one after each generation, up to the first that reaches the goal."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = eggroll_convert(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)))
    es = Eggroll(
        policy.parameters(), sigma=0.1, population=population, shaping="centered_rank", maximize=True, seed=seed
    )
    adam = torch.optim.Adam(policy.parameters(), lr=0.05)
    returns = []
    for _ in range(generations):
        pop = es.ask()
        with pop.applied_to(policy):
            values = play(policy, len(pop), 2, generator)
        es.tell(values, update=False)
        adam.step()
        returns.append(play(policy, 1, 20, generator).item())
        if returns[-1] >= goal:
            break
    return policy, returns


def play_gymnasium(policy: nn.Module, episodes: int = 20) -> float | None:
    """Mean return in gymnasium's own environment; None where it is not installed."""
    try:
        import gymnasium
    except ImportError:
        return None
    total = 0.0
    env = gymnasium.make("CartPole-v1")
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        over = False
        while not over:
            with torch.no_grad():
                action = int(policy(torch.as_tensor(observation)).argmax())
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
    return total / episodes


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Balances a pole on a cart.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the policy, the noise and the episodes")
    parser.add_argument("--generations", type=int, default=80, help="at most so many")
    parser.add_argument("--population", type=int, default=64, help="policies of a generation; even")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small runs fastest so
    begin = time.perf_counter()
    policy, returns = train(args.seed, args.generations, population=args.population)
    seconds = time.perf_counter() - begin
    other = play_gymnasium(policy)
    rows = [["seed", "generations", "return", "gymnasium", "s"]]
    played = "not installed" if other is None else f"{other:.1f}"
    rows.append([str(args.seed), str(len(returns)), f"{returns[-1]:.1f}", played, f"{seconds:.1f}"])
    print_table(rows)
    return 0 if returns[-1] >= 475 else 1


if __name__ == "__main__":
    sys.exit(main())
