"""Who a process is, by what Slurm, MPI and job manifests set."""

import pathlib

from absl.testing import absltest, parameterized

from bertjax.parallel import launchers
from bertjax.parallel.launchers import Place

_SLURM = dict(
  SLURM_JOB_ID="70001",
  SLURM_STEP_NODELIST="gpu-[017-018,021]",
  SLURM_STEP_NUM_TASKS="3",
  SLURM_NTASKS="12",  # of the allocation
  SLURM_PROCID="2",
  SLURM_LOCALID="0",
  SLURM_STEP_TASKS_PER_NODE="1(x3)",
)
_MPI = dict(
  OMPI_COMM_WORLD_SIZE="4",
  OMPI_COMM_WORLD_RANK="3",
  OMPI_COMM_WORLD_LOCAL_RANK="1",
  OMPI_COMM_WORLD_LOCAL_SIZE="2",
  JAX_COORDINATOR_ADDRESS="head",
)
_JOB = dict(
  JAX_NUM_PROCESSES="2",
  JAX_PROCESS_ID="1",
  JAX_COORDINATOR_ADDRESS="10.0.0.2:900",
)
_SLURM_PORT = 61440 + 70001 % 4096  # as JAX itself chooses it


class DetectTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("nothing", {}, None),
    (
      "slurm_sees_all_devices_of_its_node",
      _SLURM,
      Place("Slurm", f"gpu-017:{_SLURM_PORT}", 3, 2),
    ),
    (
      "slurm_shares_a_node",
      _SLURM | dict(SLURM_STEP_TASKS_PER_NODE="1,2(x1)", SLURM_LOCALID="1"),
      Place("Slurm", f"gpu-017:{_SLURM_PORT}", 3, 2, (1,)),
    ),
    (
      "slurm_with_an_address",
      _SLURM | dict(JAX_COORDINATOR_ADDRESS="there:81"),
      Place("Slurm", "there:81", 3, 2),
    ),
    ("slurm_of_one_task", _SLURM | dict(SLURM_STEP_NUM_TASKS="1",
                                        SLURM_PROCID="0"), None),
    (
      "batch_script_without_srun",
      {k: v for k, v in _SLURM.items() if "STEP" not in k},
      None,
    ),
    ("open_mpi", _MPI, Place("Open MPI", "head:8476", 4, 3, (1,))),
    (
      "mpich",
      dict(PMI_SIZE="2", PMI_RANK="0", JAX_COORDINATOR_ADDRESS="a:5"),
      Place("MPICH", "a:5", 2, 0),
    ),
    ("manifest", _JOB, Place("JAX_NUM_PROCESSES", "10.0.0.2:900", 2, 1)),
    (
      "manifest_within_slurm",
      _SLURM | _JOB,
      Place("JAX_NUM_PROCESSES", "10.0.0.2:900", 2, 1),
    ),
  )  # fmt: skip
  def test_environment(self, env, expected):
    self.assertEqual(launchers.detect(env), expected)

  def test_flags_count_more(self):
    found = launchers.detect(
      _SLURM, coordinator_address="[::1]:7", num_processes=5, process_id=4
    )
    self.assertEqual(found, Place("--num_processes", "[::1]:7", 5, 4))

  def test_tpus_know_each_other_unless_told_otherwise(self):
    tpu = launchers.detect({}, on_tpu=True)
    self.assertIsNone(tpu.coordinator_address)
    self.assertEqual(launchers.detect(_JOB, on_tpu=True).num_processes, 2)

  @parameterized.parameters(
    ("node7", "node7"),
    ("node7,node9", "node7"),
    ("tpu-[003-005,9],login", "tpu-003"),
    ("tpu-[12,14]", "tpu-12"),
    ("rack[1-2]-eth", "rack1-eth"),
  )
  def test_first_host(self, nodes, host):
    self.assertEqual(launchers.first_host(nodes), host)

  @parameterized.parameters(
    (_JOB | dict(JAX_PROCESS_ID="2"), {}, "process_id=2 .* 0..1"),
    (_JOB | dict(JAX_PROCESS_ID="x"), {}, "JAX_PROCESS_ID='x' .* integer"),
    (dict(JAX_NUM_PROCESSES="2"), {}, "JAX_PROCESS_ID go together"),
    (_JOB | dict(JAX_COORDINATOR_ADDRESS="a:b"), {}, "'a:b' must be HOST:PORT"),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, {}, "MPICH.*JAX_COORDINATOR_ADDRESS"),
    ({}, dict(num_processes=2), "process_id is missing beside num_processes=2"),
    ({}, dict(process_id=1), "num_processes is missing beside process_id=1"),
    ({}, dict(coordinator_address="a:1"), "needs num_processes"),
    ({}, dict(num_processes=0, process_id=0), "num_processes=0"),
  )
  def test_contradictions_are_refused(self, env, given, message):
    with self.assertRaisesRegex(ValueError, message):
      launchers.detect(env, **given)


class TpuMachineTest(absltest.TestCase):
  def test_devices_and_platform_decide(self):
    dev = pathlib.Path(self.create_tempdir())
    self.assertFalse(launchers.on_tpu_machine({}, str(dev)))
    (dev / "vfio").mkdir()
    (dev / "vfio" / "vfio").touch()  # the driver, no device
    self.assertFalse(launchers.on_tpu_machine({}, str(dev)))
    (dev / "vfio" / "0").touch()
    self.assertTrue(launchers.on_tpu_machine({}, str(dev)))
    self.assertTrue(
      launchers.on_tpu_machine({"JAX_PLATFORMS": "tpu,cpu"}, str(dev))
    )
    self.assertFalse(
      launchers.on_tpu_machine({"JAX_PLATFORMS": "cpu"}, str(dev))
    )


if __name__ == "__main__":
  absltest.main()
