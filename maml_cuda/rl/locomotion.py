"""The half-cheetah and the ant of the MAML paper (section 5.3), on gymnasium's models.

``mujoco.rollout`` simulates all running episodes on several threads of one process. The numbers of an episode depend
only on its own state and actions, because each control step starts the solver anew; they do not depend on the number of
threads or on other episodes.

The centre of mass, its velocity, the orientation and the contact forces are sensors that are added to the model when it
is loaded. A sensor belongs to the state before the last physics substep, 0.01 s earlier than ``qpos`` and ``qvel``,
like gymnasium's ``xpos`` and ``cfrc_ext``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from maml_cuda.extras import require
from maml_cuda.rl.environment import Environment, Step

FRAME_SKIP = 5  # physics substeps, of 0.01 s each, per control step


class Locomotion(Environment):
    """What the half-cheetah and the ant share: state, physics and sensors."""

    model_file: str
    contacts: bool  # whether contact forces are observed

    def __init__(self) -> None:
        require("mujoco", "gymnasium", extra="rl")
        import mujoco
        from mujoco import rollout

        self._mujoco, self._rollout_type = mujoco, rollout.Rollout
        self.model = self._load()
        self._full = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self._state_size = mujoco.mj_stateSize(self.model, self._full)
        self._pool: tuple[int, Any, list[Any]] | None = None
        self.action_size = self.model.nu
        self._start = self.model.qpos0.copy()
        for index in range(self.model.nnumeric):
            if self.model.numeric(index).name == "init_qpos":  # the ant's legs are bent
                self._start = self.model.numeric(index).data.copy()

    def _load(self) -> Any:
        """gymnasium's model with the sensors added. MuJoCo does not reset states that are not finite, so ``step``
        reports them.
        """
        import gymnasium

        mujoco = self._mujoco
        spec = mujoco.MjSpec.from_file(
            str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / self.model_file)
        )
        sensor, kind = mujoco.mjtSensor, mujoco.mjtObj
        for name, what in (("com", sensor.mjSENS_SUBTREECOM), ("velocity", sensor.mjSENS_SUBTREELINVEL)):
            spec.add_sensor(name=name, type=what, objtype=kind.mjOBJ_BODY, objname="torso")
        for axis in "XYZ":
            what = getattr(sensor, f"mjSENS_FRAME{axis}AXIS")
            spec.add_sensor(name=f"axis_{axis}", type=what, objtype=kind.mjOBJ_XBODY, objname="torso")
        if self.contacts:
            field = mujoco.mjtConDataField
            data = sum(1 << int(what) for what in (field.mjCONDATA_FORCE, field.mjCONDATA_TORQUE, field.mjCONDATA_POS))
            net = 3  # reduces the contacts to one wrench, in world axes
            for index, body in enumerate(spec.bodies[1:]):
                body.name = body.name or f"body_{index}"
                spec.add_sensor(
                    name=f"contact_{index}", type=sensor.mjSENS_CONTACT, objtype=kind.mjOBJ_BODY, objname=body.name,
                    intprm=[data, net, 1],
                )  # fmt: skip
        spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's XML uses settotalmass, which is deprecated
            return spec.compile()

    def _simulate(self, state: np.ndarray, control: np.ndarray | None, substeps: int) -> tuple[np.ndarray, np.ndarray]:
        """State and sensors ``[rows, ...]`` after ``substeps`` substeps."""
        threads = self.threads or torch.get_num_threads()
        if self._pool is None or self._pool[0] != threads:
            data = [self._mujoco.MjData(self.model) for _ in range(threads)]
            self._pool = threads, self._rollout_type(nthread=threads if threads > 1 else 0), data
        _, pool, data = self._pool
        state, sensors = pool.rollout(
            self.model, data, state, None if control is None else control[:, None], nstep=substeps
        )
        return state[:, -1], sensors[:, -1]

    def _reset(self, episodes: int, generator: Generator) -> Tensor:
        shape = (len(self.goals) * episodes, self.model.nq + self.model.nv)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).numpy()
        self._states = np.zeros((shape[0], self._state_size))  # time, qpos, qvel; there are no actuator states
        self._states[:, 1 : 1 + self.model.nq] = self._start + 0.01 * noise[:, : self.model.nq]
        self._states[:, 1 + self.model.nq : 1 + shape[1]] = 0.1 * noise[:, self.model.nq :]
        _, sensors = self._simulate(self._states, np.zeros((shape[0], self.model.nu)), 1)
        self._last = self._observe(self._states, sensors).float().view(*self.alive.shape, -1)
        return self._last

    def _step(self, actions: Tensor) -> Step:
        alive = self.alive.flatten()
        rows = alive.numpy()
        control = actions.flatten(0, 1)[alive].double()
        state, sensors = self._simulate(self._states[rows], control.numpy(), FRAME_SKIP)
        self._states[rows] = state
        goals = self.goals.double().repeat_interleave(self.alive.shape[1], 0)[alive]
        self._last = self._last.clone()
        self._last.view(len(alive), -1)[alive] = self._observe(state, sensors).float()
        rewards = torch.zeros(len(alive))
        rewards[alive] = self._reward(goals, torch.from_numpy(state), torch.from_numpy(sensors), control).float()
        done = torch.zeros_like(alive)
        done[alive] = self._done(torch.from_numpy(state))
        shape = self.alive.shape
        return Step(self._last, rewards.view(shape), done.view(shape))

    @abstractmethod
    def _observe(self, state: np.ndarray, sensors: np.ndarray) -> Tensor:
        """Observations ``[rows, observation_size]``."""

    @abstractmethod
    def _reward(self, goals: Tensor, state: Tensor, sensors: Tensor, control: Tensor) -> Tensor:
        """Rewards ``[rows]``."""

    def _done(self, state: Tensor) -> Tensor:
        return torch.zeros(len(state), dtype=torch.bool)

    def _position(self, state: Any) -> Any:
        return state[:, 1 : 1 + self.model.nq + self.model.nv]


class HalfCheetah(Locomotion):
    """20 observations: qpos without x (8), qvel (9), centre of mass (3). Episodes never end early."""

    model_file = "half_cheetah.xml"
    contacts = False
    observation_size = 20
    goal_size = 1

    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Goals ``[tasks, 1]``, uniform on [0, 2]."""
        return 2 * torch.rand(tasks, 1, generator=generator)

    def _observe(self, state: np.ndarray, sensors: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([self._position(state)[:, 1:], sensors[:, :3]], 1))

    def _reward(self, goals: Tensor, state: Tensor, sensors: Tensor, control: Tensor) -> Tensor:
        return self._progress(goals[:, 0], sensors[:, 3]) - 0.05 * control.square().sum(-1)

    @abstractmethod
    def _progress(self, goal: Tensor, velocity: Tensor) -> Tensor: ...


class CheetahDirection(HalfCheetah):
    """Run backwards (goal below 1) or forwards. Reward: ``direction * v - 0.05 |a|^2``, with v in m/s."""

    name = "cheetah-direction"

    def _progress(self, goal: Tensor, velocity: Tensor) -> Tensor:
        return torch.where(goal < 1, -velocity, velocity)


class CheetahVelocity(HalfCheetah):
    """Run at the velocity of the goal, in m/s. Reward: ``-|v - goal| - 0.05 |a|^2``."""

    name = "cheetah-velocity"

    def _progress(self, goal: Tensor, velocity: Tensor) -> Tensor:
        return -(velocity - goal).abs()


class Ant(Locomotion):
    """125 observations: qpos, qvel, contact forces clipped to [-1, 1], rotation matrix of the torso, centre of mass.

    An episode ends when the torso is below 0.2 m or above 1 m.
    """

    model_file = "ant.xml"
    contacts = True
    observation_size = 125
    goal_size = 1

    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Goals ``[tasks, 1]``, uniform on [0, 3]."""
        return 3 * torch.rand(tasks, 1, generator=generator)

    def _observe(self, state: np.ndarray, sensors: np.ndarray) -> Tensor:
        sensors_ = torch.from_numpy(sensors)
        rotation = sensors_[:, 6:15].unflatten(1, (3, 3)).transpose(1, 2).flatten(1)  # sensors hold its columns
        contact = _contact(sensors_).flatten(1)
        world = torch.zeros(len(contact), 6, dtype=contact.dtype)  # body 0 is the world, whose force is 0
        return torch.cat([torch.from_numpy(self._position(state)), world, contact, rotation, sensors_[:, :3]], 1)

    def _reward(self, goals: Tensor, state: Tensor, sensors: Tensor, control: Tensor) -> Tensor:
        costs = 0.005 * control.square().sum(-1) + 0.0005 * _contact(sensors).square().sum((1, 2))
        return self._progress(goals, sensors) - costs + 0.05

    @abstractmethod
    def _progress(self, goals: Tensor, sensors: Tensor) -> Tensor: ...

    def _done(self, state: Tensor) -> Tensor:
        height = state[:, 3]
        return ~((height >= 0.2) & (height <= 1.0))


class AntDirection(Ant):
    """Run backwards (goal below 1.5) or forwards. Reward: ``direction * v``, with v in m/s."""

    name = "ant-direction"

    def _progress(self, goals: Tensor, sensors: Tensor) -> Tensor:
        return torch.where(goals[:, 0] < 1.5, -sensors[:, 3], sensors[:, 3])


class AntVelocity(Ant):
    """Run at the velocity of the goal, in m/s. Reward: ``1 - |v - goal|``."""

    name = "ant-velocity"

    def _progress(self, goals: Tensor, sensors: Tensor) -> Tensor:
        return 1 - (sensors[:, 3] - goals[:, 0]).abs()


class AntGoal(Ant):
    """Reach a position on the plane, in m. Reward: ``4 - |x - goal_x| - |y - goal_y|``."""

    name = "ant-goal"
    goal_size = 2

    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Goals ``[tasks, 2]``, uniform on [-3, 3]^2."""
        return 6 * torch.rand(tasks, 2, generator=generator) - 3

    def _progress(self, goals: Tensor, sensors: Tensor) -> Tensor:
        return 4 - (sensors[:, :2] - goals).abs().sum(-1)


def _contact(sensors: Tensor) -> Tensor:
    """The contact force on each body, ``[rows, bodies, 6]``, clipped to [-1, 1], as MuJoCo's ``cfrc_ext``: torque about
    the centre of mass of the whole robot, then force.

    A contact sensor holds the force that its body exerts (hence the minus), the torque of that force, and its position.
    """
    force, torque, where = sensors[:, 15:].unflatten(1, (-1, 3, 3)).unbind(2)
    torque = torque + torch.linalg.cross(where - sensors[:, None, :3], force)
    return -torch.cat([torque, force], -1).clamp(-1, 1)
