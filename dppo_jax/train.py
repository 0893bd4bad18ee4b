"""The training loop, read from top to bottom. Its keyword-only signature is the recipes' schema.

prompts -> sampling -> rewards -> advantages -> scoring -> divergence, objective -> update
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dppo_jax import lora_run
from dppo_jax.advantages import Estimator, group_mean_baseline
from dppo_jax.ahead import AheadCollector, check_ahead, foresight
from dppo_jax.answers import log_samples
from dppo_jax.batches import RewardPenalty, make_batch_of, needs_of
from dppo_jax.checkpoint import Checkpoints, load_params, newest_step, save_params
from dppo_jax.clusters import Preempted
from dppo_jax.collect import Asking, Collector
from dppo_jax.console import Console
from dppo_jax.critic import ValueHead, ValueModel
from dppo_jax.dynamic_sampling import DynamicSampling
from dppo_jax.elsewhere import Elsewhere, divide
from dppo_jax.evaluate import (
    EvalSet,
    Evaluator,
    accuracies,
    eval_sets_or_default,
    first_accuracy,
    open_answers,
)
from dppo_jax.hosts import Preemption, first_process_first
from dppo_jax.initial_policy import InitialContext, InitialPolicy, hf_folder, reporter
from dppo_jax.masked_tokens import as_files, most_masked
from dppo_jax.metrics import CompilationCounter, JsonLines, MakeMirror, RunLog, reduce_metrics
from dppo_jax.models.decoder import DecoderConfig, Params
from dppo_jax.models.fused_attention import described
from dppo_jax.models.lora import LoraConfig
from dppo_jax.multihost import is_writer, row_share
from dppo_jax.partial_rollouts import PartialCollector, PartialRollouts, check_partial
from dppo_jax.preflight import check_counts, check_needs, check_routing, check_sizes, write_files
from dppo_jax.prompts.mixture import Curriculum, Dataset, load_train
from dppo_jax.prompts.overlap import OnOverlap, check_overlap
from dppo_jax.prompts.pipeline import PromptIterator, TooLong
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import Objective, TrainState
from dppo_jax.reward_model import RewardModel, Scorer
from dppo_jax.rewards.verdicts import Verifier, check_examples
from dppo_jax.rollout_policy import RolloutPolicy, chained, chooser, current, stale
from dppo_jax.run_directory import claim
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import Lockstep, MakeRollouts, RolloutContext
from dppo_jax.sharding import MeshConfig
from dppo_jax.step_numbers import fraction, refuse_not_finite, step_numbers
from dppo_jax.timing import Pace, Stopwatch
from dppo_jax.update import init_state, make_tightness, make_update, take_prompts


def train(
    *,
    workdir: str,
    model: DecoderConfig,
    tokenizer: Tokenizer,
    initial_policy: InitialPolicy,
    dataset: Dataset,
    data_dir: str,
    verifier: Verifier,
    sampling: SamplingConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    prompts_per_step: int,
    max_prompt_tokens: int,
    too_long: TooLong = "error",
    curriculum: Curriculum | None = None,
    overlap: OnOverlap = "warn",
    minibatches: int = 1,
    microbatches: int = 1,
    tokens_per_microbatch: int | None = None,
    reward_model: RewardModel | None = None,
    advantage: Estimator = group_mean_baseline,
    reward_penalty: RewardPenalty | None = None,
    reference: InitialPolicy | None = None,
    lora: LoraConfig | None = None,
    critic: ValueModel | ValueHead | None = None,
    rollouts: MakeRollouts = Lockstep,
    rollout_policy: RolloutPolicy = current(),  # noqa: B008  immutable
    routing: Literal["native", "replay", "replay_trainer"] = "native",
    async_depth: int = 0,
    sampler_devices: int = 0,
    rollout_batches: int = 1,
    dynamic_sampling: DynamicSampling | None = None,
    partial_rollouts: PartialRollouts | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  frozen
    eval_split: str = "test",
    eval_every: int = 0,
    eval_prompts: int | None = None,
    eval_sets: Sequence[EvalSet] | None = None,
    checkpoint_every: int = 0,
    exact_divergence_every: int = 0,
    samples_logged: int = 2,
    mirrors: Sequence[MakeMirror] = (),
    seed: int = 0,
    console: Console | None = None,
    configuration: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Trains a policy and returns what `summary.json` holds.

    A step samples `sampling.samples_per_prompt` responses to each of `prompts_per_step` prompts and
    takes `minibatches` gradient steps over them, each accumulated over `microbatches`, or over as
    many packed ones of `tokens_per_microbatch` as the sequences need. `rollouts` makes what
    samples; it is asked in `rollout_batches` parts, each graded while the next is sampled, and with
    `dynamic_sampling` for more prompts where groups have no spread; with `partial_rollouts` what is
    unfinished goes on in the next step. With `async_depth` the next step is sampled during this one
    by parameters so many steps old, with `sampler_devices` on so many devices of each host. A
    `reward_model` judges the training answers beside the verifier, those of no evaluation. A
    `workdir` that holds a run is resumed at its newest checkpoint. Evaluation over `eval_sets`
    (where None: the first `eval_prompts` of the data set's `eval_split`) happens before, every
    `eval_every` steps (0: never) and after. Problems that they share with training are told, or
    refused.
    `reference` is what KL terms are measured from: by default the policy that the run starts with.
    With `lora` only adapters are trained, and the default reference is the policy without them.
    Experts are chosen anew at each forward pass (`routing` "native"), or the sampler's are replayed
    in scoring and update ("replay": R3), or those of the scorer before the updates in the updates
    ("replay_trainer": R2).
    Every `exact_divergence_every` steps (0: never) `scoring.tightness` is measured after the step.
    `mirrors` show the metrics elsewhere too, as `metrics.tensorboard()` does.
    Raises ValueError with one line where the configuration contradicts itself, and then leaves no
    `workdir` behind. `configuration` is what the run was asked for, as texts by file name; they
    are written beside the first checkpoint.
    """
    # ---- what the run is made of ------------------------------------------------------------
    started = time.monotonic()
    console = console or Console(quiet=not is_writer())
    compilations = CompilationCounter()
    directory = Path(workdir)
    network = lora_run.network_of(model, lora)
    sampling_devices, training_devices = divide(jax.devices(), sampler_devices)
    devices = mesh.build(training_devices)
    share = row_share(devices)
    sampling = dataclasses.replace(sampling, end_ids=(tokenizer.end_id,))
    valued = None if critic is None else critic.build(model)
    needs = needs_of(objective, advantage, reward_penalty)
    check_sizes(
        model, tokenizer, sampling, devices, steps, prompts_per_step, minibatches, microbatches,
        max_prompt_tokens, rollout_batches,
    )  # fmt: skip
    check_counts(seed, eval_every, checkpoint_every, exact_divergence_every, samples_logged)
    check_needs(needs, objective, advantage, valued, tokenizer, devices, sampling)
    check_routing(model, routing)
    recording = dataclasses.replace(sampling, record_experts=routing == "replay")

    knowing = RolloutContext(network, devices, tokenizer, max_prompt_tokens, recording)
    source = (
        Elsewhere(rollouts, knowing, sampling_devices) if sampler_devices else rollouts(knowing)
    )
    with first_process_first("data"):  # which may prepare a set of it
        problems = load_train(dataset, data_dir)
        unfit = check_examples(verifier, problems, "the training set")
        evaluate = Evaluator(
            source,
            eval_sets_or_default(eval_sets, dataset, eval_split, eval_prompts),
            vocab_size=model.vocab_size,
            mesh=devices,
            tokenizer=tokenizer,
            verifier=verifier,
            sampling=sampling,
            data_dir=data_dir,
            prompts_per_batch=prompts_per_step,
            max_prompt_tokens=max_prompt_tokens,
            too_long=too_long,
            seed=seed,
        )
    for line in unfit + evaluate.unfit + check_overlap(problems, evaluate.held_out, overlap):
        console.say(f"warning: {line}")
    prompts = PromptIterator(
        problems,
        tokenizer,
        prompts_per_step=prompts_per_step,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        process_index=share.index,
        process_count=share.count,
        too_long=too_long,
        curriculum=curriculum,
    )
    scorer = None if reward_model is None else Scorer(reward_model, devices)
    asking = Asking(devices, tokenizer, verifier, recording, prompts_per_step, scorer)
    check_ahead(async_depth, dynamic_sampling, rollout_batches, partial_rollouts, rollout_policy)
    collect: Collector | PartialCollector | AheadCollector
    if async_depth:
        rollout_policy = chained([stale(async_depth), rollout_policy])
        collect = AheadCollector(source, prompts, asking, async_depth, steps)
    elif partial_rollouts is None:
        collect = Collector(source, prompts, asking, rollout_batches, dynamic_sampling)
    else:
        engine = check_partial(source, dynamic_sampling, rollout_batches)
        collect = PartialCollector(engine, prompts, asking, partial_rollouts)
    key = jax.random.key(seed)
    initial_key, sampling_key = jax.random.split(key)
    update = make_update(
        network, objective, optimizer, valued, temperature=sampling.temperature,
        microbatches=microbatches, tokens_per_microbatch=tokens_per_microbatch,
    )  # fmt: skip
    batch_of = make_batch_of(
        network, objective, advantage, reward_penalty, valued, temperature=sampling.temperature,
        replay_own_routing=routing == "replay_trainer", tokens_per_microbatch=tokens_per_microbatch,
    )  # fmt: skip
    choose = chooser(rollout_policy)
    foresee = foresight(rollout_policy, sampling_key)
    tightness = make_tightness(network, sampling.temperature, parts=minibatches * microbatches)
    exact = "exact_divergence" in objective.needs
    exact_old = "exact_divergence_old" in objective.needs

    def fresh_state(params: Params, base: Params | None) -> TrainState:
        memory = rollout_policy.init(network.policy(params, base))
        state = init_state(params, optimizer, objective.initial_state, memory)
        counts = jnp.zeros((3, model.vocab_size), jnp.int32)
        state = dataclasses.replace(state, token_counts=counts)
        if valued is None:
            return state
        values = valued.init_sharded(jax.random.fold_in(initial_key, 1), base or params, devices)
        return dataclasses.replace(state, critic=init_state(values, valued.optimizer))

    # ---- restart order: the run's own newest checkpoint, else the initial policy -------------
    done = newest_step(directory)
    summary_path = directory / "summary.json"
    if done == steps and summary_path.exists():
        console.say(f"{directory} holds this run, complete: nothing to do")
        return json.loads(summary_path.read_text())
    frozen = None  # the reference's parameters, where somebody asks for them
    closing = contextlib.ExitStack()  # whatever ends the run: its newest checkpoint is waited for
    with jax.set_mesh(devices), Preemption() as preemption, closing:
        if done is None:
            done, seconds_before = 0, 0.0
            context = InitialContext(
                network,
                devices,
                initial_key,
                tokenizer,
                problems,
                max_prompt_tokens,
                sampling.max_new_tokens,
                reporter(console, preemption),
            )
            params, base = lora_run.begin(network, initial_policy(context), initial_key, devices)
            state = fresh_state(params, base)
            evaluated = evaluate(network.policy(state.params, base))
            before = evaluated.as_dict()
            for name, each in accuracies(before).items():
                console.say(f"initial policy: {name} {each['accuracy']:.3f}")
            position: dict[str, Any] = {
                "prompts": prompts.get_state(),
                "before": before,
                "seconds": time.monotonic() - started,
            }
            closing.enter_context(claim(directory))
            kept_base = lora_run.keep(directory, network, base, hf_folder(initial_policy))
            write_files(directory, kept_base | dict(configuration or {}))
            kept = open_answers(directory, 0)
            evaluated.write(kept, 0)
            if "logp_ref" in needs and (reference or not base):
                frozen = reference(context) if reference else jax.tree.map(jnp.copy, state.params)
                if newest_step(directory / "reference") is None:
                    save_params(directory / "reference", frozen)
            checkpoints = Checkpoints(directory / "checkpoints")
            checkpoints.save(0, state, key, position)
        else:
            closing.enter_context(claim(directory))
            params, base = lora_run.begin_again(directory, network, key, devices)
            like = fresh_state(params, base)
            checkpoints = Checkpoints(directory / "checkpoints")
            state, _, position = checkpoints.restore(done, like, key)
            if "logp_ref" in needs and (reference or not base):
                frozen = load_params(directory / "reference", base or state.params)
            prompts.set_state(position["prompts"])
            collect.carry(position.get("carried", []))
            before = position["before"]
            seconds_before = position["seconds"]
            write_files(directory, configuration or {})
            kept = open_answers(directory, min(done + 1, steps))
            console.say(f"resuming {directory} after step {done} of {steps}")
        frozen = frozen or base  # with LoRA by default the policy without its adapters
        closing.callback(checkpoints.close)
        log = RunLog(directory, done, mirrors, quiet=not is_writer())
        samples = JsonLines(directory / "samples.jsonl", resume_at=done, quiet=not is_writer())
        for file in (log, samples, kept):
            closing.callback(file.close)

        if preemption.anywhere():  # during the first evaluation, or while this was read
            raise Preempted.behind(directory, done, steps)

        # ---- the loop -----------------------------------------------------------------------
        pace = Pace()
        for step in range(done, steps):
            compiled, clock = compilations.total, Stopwatch()
            step_key = jax.random.fold_in(sampling_key, step)
            whole = network.policy(state.params, base)
            mu, memory = choose(state.rollout_memory, whole, step, step_key)
            jax.block_until_ready(mu)
            clock.lap("weight_sync")
            # Copies, as updates donate their parameters; each step, so that none compiles late.
            rollout_params = network.copied(mu) if exact or exact_divergence_every else None
            anchor = network.copied(whole) if exact_old else rollout_params if exact else None
            state = dataclasses.replace(state, rollout_memory=memory)

            # What later steps sample with is known before this one's updates.
            later = functools.partial(foresee, state.rollout_memory, whole)
            ahead: dict[str, Any] = {"later": later} if async_depth else {}
            rollout, rewards, examples, answers, sampled = collect(
                mu, step_key, clock, version=step, **ahead
            )
            del mu  # a cast copy of the weights, whose room the updates may need
            batch, known = batch_of(state, frozen, rollout, rewards, base)
            jax.block_until_ready(batch)
            clock.lap("scoring")

            order = np.random.default_rng((seed, step)).permutation(prompts_per_step)
            gathered = []
            for chosen in order.reshape(minibatches, -1):
                minibatch = take_prompts(batch, jnp.asarray(chosen))
                state, metrics = update(state, minibatch, anchor, base)
                gathered.append(metrics)
            numbers = step_numbers(gathered) | reduce_metrics(known)
            clock.lap("update")

            numbers |= {
                **sampled,
                "prompts/epoch": prompts.epoch,
                **{f"prompts/epoch/{name}": n for name, n in prompts.epochs.items() if name},
                **clock.seconds,
                "time/tokens_per_second": sampled["response/tokens"] / clock.seconds["time/step"],
                "time/compilations": compilations.total - compiled,
            }
            if step > done and numbers["time/compilations"]:
                console.say(f"step {step + 1} recompiled: shapes or types changed since step 1")
            if eval_every and (step + 1) % eval_every == 0 and step + 1 < steps:
                evaluated = evaluate(network.policy(state.params, base))
                evaluated.write(kept, step + 1)
                numbers |= evaluated.as_metrics()
            measured = exact_divergence_every and (step + 1) % exact_divergence_every == 0
            if measured and rollout_params:
                numbers |= reduce_metrics(
                    tightness(rollout_params, network.policy(state.params, base), rollout)
                )
            log.write(step=step, **numbers)
            log_samples(samples, step, examples, answers, samples_logged)
            refuse_not_finite(numbers, step)
            console.step(
                "step",
                step + 1,
                steps,
                {
                    "reward": f"{numbers['reward/mean']:.3f}",
                    "masked": fraction(numbers.get("mask/fraction")),
                    "mismatch": f"{numbers['mismatch/logp_abs_mean']:.1e}",
                    "tokens/s": f"{numbers['time/tokens_per_second']:,.0f}",
                },
                seconds_left=pace.seconds_left(steps - step - 1),
            )
            last = step + 1 == steps
            stop = preemption.anywhere() and not last
            if last or stop or (checkpoint_every and (step + 1) % checkpoint_every == 0):
                position |= {"prompts": collect.begins(), "carried": collect.carried()}
                position["seconds"] = seconds_before + time.monotonic() - started
                checkpoints.save(step + 1, state, key, position)
            if stop:
                raise Preempted.behind(directory, step + 1, steps)
        console.finish_line()

        # ---- the result -----------------------------------------------------------------------
        evaluated = evaluate(network.policy(state.params, base))
        evaluated.write(kept, steps)
        after = evaluated.as_dict()
        masked = most_masked(jax.device_get(state.token_counts), tokenizer)
        write_files(directory, as_files(masked))
    summary = {
        "accuracy_before": first_accuracy(before),
        "accuracy_after": first_accuracy(after),
        "steps": steps,
        "wall_seconds": round(seconds_before + time.monotonic() - started, 1),
        "seed": seed,
        "most_masked": [token.text for token in masked[:5]],
        "before": before,
        "after": after,
        "jax": jax.__version__,
        "attention": described(model),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    if is_writer():
        summary_path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary
