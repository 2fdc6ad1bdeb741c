"""Plants mistakes one by one in a copy of the code and sees whether a test of the default suite finds each.

    python tests/mutations.py                       # all
    python tests/mutations.py pack.py               # those of one file
    python tests/mutations.py --output found.txt    # the lines also go to a file

Prints a line for each and, at the end, how many were found and in how many seconds; ends with exit code 1 if one
survives. For each mistake the files of tests are run that ought to find it. A worker imports torch and the other
libraries once and forks for each mistake; the fork imports the package with the mistake in it and runs pytest. A test
that fails is run again without the mistake: if it fails then too, the fork is to blame, and a new process decides.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from typing import NamedTuple

HOME = Path(__file__).parents[1]
PRELOAD = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "pydantic", "rich")
"""What a worker imports before it forks: everything but the package, and what pytest rewrites."""
IMPORTED_BEFORE = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
"""Of anyio, which comes with huggingface_hub and is a plugin of pytest too."""
TIMEOUT = 900
"""Seconds after which a mistake counts as found, since the tests hang."""

LOSS = "preference/test_objective.py preference/test_oracle.py training/test_trl_engine.py preference/test_losses.py"
LOGPS = "preference/test_logps.py preference/test_packed_rows.py"
PACK = "preference/test_pack.py preference/test_packed_rows.py"
RECURRENT = "model/test_recurrent_rows.py"
LEAN = "model/test_fused_lora.py preference/test_packed_rows.py"
LOOP = "training/test_loop.py training/test_checkpoint.py"
REFERENCE = "preference/test_reference.py training/test_loop.py"
KINDS = "preference/test_reference_adapter.py training/test_reference_kinds.py"
SAVED = "model/test_saved_adapter.py"
MOVING = "faults/test_reference_resumes.py"
CHECKPOINT = "training/test_checkpoint.py faults/test_crashes.py faults/test_resumes.py"
MERGE = "deploy/test_merge.py deploy/test_merge_kinds.py deploy/test_base_choice.py"
WATCH = "training/test_watch.py"
BEST = "training/test_best.py"
FITTING = "training/test_oom_retry.py"
DEVICE = "model/test_device.py"
JOURNAL = "preference/test_logp_journal.py"
PROCESSES = "model/test_processes.py"
GPU = "training/test_pretended_gpu.py"
WAITS = "test_the_host_waits_for_the_gpu_a_few_times_a_step_and_in_no_micro_batch"

MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "on_policy/choose.py": [
        ("- 2 * statistics.pstdev(scores)", "+ 2 * statistics.pstdev(scores)", "on_policy/test_choose.py"),
        ("if better_score > worse_score and", "if", "on_policy/test_choose.py"),
        ("        if not answer.ended:", "        if False:", "on_policy/test_choose.py"),
        ("[min(different, key=", "[max(different, key=", "on_policy/test_choose.py"),
    ],
    "on_policy/journal.py": [
        ("self._file.truncate(len(whole))", "pass", "on_policy/test_journal.py"),
        ("            if lines:", "            if False:", "on_policy/test_pairs_command.py"),
    ],
    "on_policy/scores.py": [
        ('verdicts == ["A", "B"] else 0.0', 'verdicts == ["A", "A"] else 0.0', "on_policy/test_scores.py"),
        ("won[second] += 1 - gain", "won[second] += gain", "on_policy/test_scores.py"),
    ],
    "talk/generate.py": [
        ("uniform_RT[list(rows), count, None]", "uniform_RT[list(rows), 0, None]", "talk/test_sample_completions.py"),
        ("_generator(settings.seed, seeds[index], copy)", "_generator(0, copy)", "talk/test_sample_completions.py"),
        ("*decoded[: cache.count]]", "*decoded]", "talk/test_fused_decoder.py"),
    ],
    "talk/fused_decoder.py": [
        ("* layer.scaling, cache", ", cache", "talk/test_fused_decoder.py"),
        ("return normalized.mul_(self.weight)", "return normalized", "talk/test_fused_decoder.py"),
        ("slot_R // cache.copies] + cache.count", "slot_R // cache.copies]", "talk/test_fused_decoder.py"),
        ("if cache.padding_P11L is not None:", "if False:", "talk/test_fused_decoder.py"),
        (
            "+ torch.arange(self.copies)).flatten()",
            "+ torch.zeros(self.copies, dtype=int)).flatten()",
            "talk/test_fused_decoder.py",
        ),
        ("cache.keys[index][place, :, cache.count]", "cache.keys[index][place, :, 0]", "talk/test_fused_decoder.py"),
        ("if _has_hooks(model) or not", "if not", "talk/test_fused_decoder.py"),
        (".to(layer.values.dtype)", "", "talk/test_fused_decoder.py"),
        ("dtype not in (torch.float32, torch.bfloat16)", "False", "talk/test_fused_decoder.py"),
    ],
    "talk/decoder_products.py": [
        ("or layer.disable_adapters:", ":", "talk/test_fused_decoder.py"),
        ("* layer.scaling[name]).T", ").T", "talk/test_fused_decoder.py"),
        (", alpha=layer.scaling[name])", ")", "talk/test_fused_decoder.py"),
        ("output_RO += self.bias", "pass", "talk/test_fused_decoder.py"),
        ("start += layer.out_features", "pass", "talk/test_fused_decoder.py"),
        ("copy.deepcopy(base.weight.quant_state)", "base.weight.quant_state", "talk/test_fused_decoder.py"),
        ("starts.append(start)", "starts.append(0)", "talk/test_fused_decoder.py"),
        ("rows <= MAX_4BIT_ROWS", "True", "talk/test_fused_decoder.py"),
        ("* dtype.itemsize", "* 4", "talk/test_fused_decoder.py"),
    ],
    "cli/probe.py": [
        ("in (numbers[0], numbers[-1]):", "in (numbers[0],):", "training/test_sweep.py"),
    ],
    "talk/decode.py": [
        ("past.reorder_cache(prompt_R)", "past.reorder_cache(prompt_R * 0)", "talk/test_generate_families.py"),
        ("tokens > PADDING_LIMIT * sum(padded)", "False", "talk/test_fused_decoder.py"),
    ],
    "model/malloc.py": [
        ("if rss_bytes() > limit:", "if rss_bytes() < limit:", "model/test_memory.py"),
        ("(rss_bytes() + planned_bytes)", "(rss_bytes() + 2 * planned_bytes)", "model/test_memory.py"),
    ],
    "data/templates/chat_format.py": [
        ("    return whole if all(", "    return whole if any(", "data/test_trl_templates.py"),
    ],
    "data/templates/template_settings.py": [
        ('{"enable_thinking": False}', '{"enable_thinking": True}', "data/test_trl_templates.py"),
        ("tokenizer.eos_token = _CHATML_MARKS[1]", "pass", "data/test_template_settings.py"),
    ],
    "data/templates/template_marks.py": [
        ("trims=not is_control", "trims=is_control", "data/test_rendered.py"),
    ],
    "data/rows/compared.py": [
        ("return int(number - first_number)", "return 1 - int(number - first_number)", "data/test_compared.py"),
        ("places.count(0), places.count(1)", "places.count(1), places.count(0)", "data/test_compared.py"),
        ("if number != 0 or", "if number == 0 or", "data/test_compared.py"),
    ],
    "data/rows/published.py": [
        ('"chosen": answers[better]', '"chosen": answers[1 - better]', "data/test_compared.py"),
    ],
    "model/transfer.py": [
        (".pin_memory()", "", f"{GPU}::{WAITS}"),
        (", non_blocking=True", "", f"{GPU}::{WAITS}"),
    ],
    "training/checkpoint/rng_state.py": [
        ("torch.cuda.set_rng_state(state, index)", "pass", GPU),
    ],
    "model/distributed/processes.py": [
        ('_reduce(flat, "sum")', '_reduce(flat, "mean")', PROCESSES),
        ("if all_reduce_any(out_of_memory):", "if out_of_memory:", PROCESSES),
        ("(2 * end - cost) * world_size()", "2 * end * world_size()", PROCESSES),
    ],
    "preference/objective.py": [
        (
            "agree_P = -F.logsigmoid(beta * margin_P)",
            "agree_P = -F.logsigmoid(margin_P)",
            LOSS,
        ),
        (
            "return (1 - label_smoothing) * agree_P + label_smoothing * flipped_P",
            "return agree_P + label_smoothing * flipped_P",
            LOSS,
        ),
        ("/ (1 - 2 * label_smoothing)", "", LOSS),
        ("torch.relu(1 - beta * margin_P)", "torch.relu(1 - margin_P)", LOSS),
        ("(margin_P - 1 / (2 * beta)) ** 2", "(margin_P - 1 / beta) ** 2", LOSS),
        ("math.log1p(-label_smoothing)", "math.log(label_smoothing)", LOSS),
        ("- 0.5 * F.logsigmoid(-beta * rejected_P)", "- 0.5 * F.logsigmoid(beta * rejected_P)", LOSS),
        ("return (chosen_P - 0.5 / beta) ** 2", "return (chosen_P + 0.5 / beta) ** 2", LOSS),
        ("torch.sigmoid(-beta * (chosen_P - rejected_P))", "torch.sigmoid(beta * (chosen_P - rejected_P))", LOSS),
        ("0.5 * pull_P", "pull_P", LOSS),
        ("dpop_lambda * torch.relu(-chosen_P)", "dpop_lambda * torch.relu(chosen_P)", LOSS),
        ("beta * margin_P + length_alpha * longer_P", "beta * margin_P - length_alpha * longer_P", LOSS),
        ("torch.sigmoid(-beta * (ratio_P - mean_P))", "torch.sigmoid(-beta * ratio_P)", LOSS),
        ("other_P.detach().mean().clamp(min=0)", "other_P.detach().mean()", LOSS),
        ("beta * margin_P - odpo_alpha * offset_P", "beta * margin_P", LOSS),
        ("reward_P - gamma / beta", "reward_P - gamma", LOSS),
        ("-beta * F.logsigmoid(odds_P)", "-F.logsigmoid(odds_P)", LOSS),
        ("one_P.sort().values - other_P.sort().values", "one_P - other_P", LOSS),
        ("-chosen_logp_P / chosen_tokens_P", "-chosen_logp_P", LOSS),
        ("ratio_P2 = ratio_P2 - logps.reference_P2", "ratio_P2 = ratio_P2 - logps.reference_P2.flip(1)", LOSS),
        ("ratio_P2 = ratio_P2 - logps.reference_P2", "pass", LOSS),
        ("preference_P + (table.sft_weight * sft_P", "preference_P + (sft_P", LOSS),
        ("return dpo(score_P - target_P, beta, table.label_smoothing)", "return dpo(score_P - asked_P, beta)", LOSS),
        ("preference_P = preference_P * logps.wpo_weight_P", "pass", LOSS),
        ("total_P = total_P * logps.columns.weight_P", "pass", LOSS),
        ("-torch.expm1(-alpha * mean_logp_P) / alpha", "torch.expm1(alpha * mean_logp_P) / alpha", LOSS),
        ("mean = table.beta_momentum * mean + (1 - table.beta_momentum) * now", "mean = now", LOSS),
    ],
    "preference/token_weights.py": [
        ("[alpha] * (length - shorter)", "[1.0] * (length - shorter)", LOSS),
        ("_random_mask(length, shorter, draw)", "_drawn(length, length, draw)", LOSS),
        ("random.Random(pair.digest)", "random.Random()", LOSS),
    ],
    "preference/metrics.py": [
        ("self.pairs += len(chosen_P)", "self.pairs += 1", LOOP),
        ("torch.where(tie_P, 0.5,", "torch.where(tie_P, 1.0,", LOOP),
        (
            "correct_P, chosen_P - rejected_P)",
            "correct_P, rejected_P - chosen_P)",
            LOOP + " training/test_trl_engine.py",
        ),
        (
            "totals[name] / weights.get(name, self.pairs)",
            "totals[name] / self.pairs",
            LOOP + " training/test_trl_engine.py",
        ),
        ('"entropy": chosen + rejected', '"entropy": chosen', "training/test_trl_engine.py"),
    ],
    "preference/logps.py": [
        ("logp_S[:pairs]", "logp_S[pairs:]", LOGPS),
        (
            "rejected_tokens_P=batch.tokens_S[pairs:]",
            "rejected_tokens_P=batch.tokens_S[:pairs]",
            LOGPS + " training/test_trl_engine.py",
        ),
        ("batch.row_N[tokens] - states.start", "batch.row_N[tokens]", LOGPS),
        ("others_RD * -gradient_R[:, None]", "others_RD * gradient_R[:, None]", LOGPS),
        ("gradient_N - gradient_R[row_N] * logp_N.exp()", "gradient_N", LOGPS),
        ("total_c = total_c * shrink_c + share_cv.sum(-1)", "total_c = total_c + share_cv.sum(-1)", LOGPS),
        ("weighted_c = weighted_c * shrink_c +", "weighted_c = weighted_c +", LOGPS),
        ("amount_n, alpha=-1)", "amount_n, alpha=0)", LOGPS),
        ("logits_cv[place], target_logit_n)", "logits_cv[place], logits_cv[place])", LOGPS),
        ("others_cD.mul_(shrink_c[:, None]).add_", "others_cD.add_", LOGPS),
        ("column_n = target_n - start", "column_n = target_n", LOGPS),
        ("logits_c / vocabulary", "logits_c / tile_size", LOGPS),
        ("logits_cv += bias_V[start : start + tile_size].to(exact)", "pass", LOGPS),
    ],
    "preference/pack.py": [
        ("position_l[-len(completion) - 1 : -1]", "position_l[-len(completion) :]", PACK),
        (
            "position_l[-len(completion) - 1 : -1], completion",
            "position_l[-len(completion) - 1 : -2], completion[:-1]",
            PACK,
        ),
        ("positions.extend(range(shared, len(sequence)))", "positions.extend(range(len(sequence) - shared))", PACK),
        (
            "positions.extend(range(shared, len(sequence)))",
            "positions.extend(range(len(ids) - len(sequence) + shared, len(ids)))",
            PACK,
        ),
        ("_contiguous_ranges(where[:shared])", "((0, len(ids)),)", PACK),
        ("_contiguous_ranges(where[:shared])", "()", PACK),
        ("mask[row, :length] = 1", "mask[row] = 1", PACK),
        ("if groups and pair_tokens - shared <= remaining:", "if True and groups:", PACK),
        (
            "tokens=sum(map(len, places.position_SL))",
            "tokens=places.input_ids_BL.numel()",
            PACK + " training/test_trl_engine.py",
        ),
        (
            "completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]",
            "completions = [pair.rejected for pair in pairs] + [pair.chosen for pair in pairs]",
            PACK,
        ),
    ],
    "preference/reference.py": [
        ("with as_reference(model, reference), torch.no_grad():", "with torch.no_grad():", REFERENCE),
        ("with as_reference(model, reference), torch.no_grad():", "with as_reference(model), torch.no_grad():", KINDS),
        (
            "                with as_reference(model, reference):\n                    logps_P2",
            "                if True:\n                    logps_P2",
            REFERENCE,
        ),
        (
            "                with as_reference(model, reference):\n",
            "                with as_reference(model):\n",
            KINDS,
        ),
    ],
    "preference/start_checks.py": [
        ("if not torch.equal(probe_logits(model, pair, device), peft_logits_LV):", "if False:", SAVED),
        ("if not bool((fresh_P2 - cached_P2).norm()", "if not bool((fresh_P2 - fresh_P2).norm()", KINDS),
        ("dpo(drift_P2[:, 0] - drift_P2[:, 1], beta)", "dpo(drift_P2[:, 0] - drift_P2[:, 0], beta)", REFERENCE),
    ],
    "preference/reference_cache.py": [
        ('**({"adapter": adapter} if adapter else {}),', "", KINDS),
        ('"base": source.fingerprint,', "", REFERENCE),
        ('"quantization": table.quantization,', "", REFERENCE),
        ("if hashlib.sha256(content).hexdigest() != file.stem:", "if False:", REFERENCE),
        ("self.unsaved |= added", "pass", REFERENCE),
    ],
    "preference/logp_journal.py": [
        ("_checksum(body) == content[(n + 1) * size - 8 : (n + 1) * size]", "True", JOURNAL),
        ("fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", JOURNAL),
        ("os.lseek(self._handle, 0, os.SEEK_SET)", "pass", JOURNAL),
    ],
    "preference/logp_table.py": [
        ("self.digest_P[place_Q] == digest_Q", "place_Q >= 0", JOURNAL),
        ("kept = np.isnan(newer.lookup(self.digest_P)[:, 0])", "kept = np.ones(len(self), dtype=bool)", JOURNAL),
    ],
    "data/arrow_cache.py": [
        ('if file_sha256(path) == path.name.split(".")[1]:', "if True:", "data/test_scan_cache.py"),
    ],
    "data/encoded_cache.py": [
        (
            "if digest_ids(entry.prompt, entry.chosen, entry.rejected) != entry.digest:",
            "if False:",
            "data/test_token_cache.py",
        ),
        (
            "return reason if _reason_digest(reason) == entry.digest else None",
            "return reason",
            "data/test_token_cache.py",
        ),
    ],
    "preference/reference_adapter.py": [
        ("        _set_adapter_weights(model, policy_weights)", "        pass", KINDS),
        ("mul_(1 - alpha).add_(parameter, alpha=alpha)", "mul_(alpha).add_(parameter, alpha=1 - alpha)", KINDS),
        ("or step % reference.ema.ref_model_sync_steps", "", KINDS),
        ("parameter.detach().clone()", "parameter.detach()", KINDS),
    ],
    "model/saved_adapter.py": [
        ("if recipe_value != saved_value:", "if False:", SAVED),
        ('if base.get("fingerprint") != source.fingerprint:', "if False:", SAVED),
        ('f"{effect_json} {file_sha256(folder / ADAPTER_SAFE_WEIGHTS_NAME)}"', "effect_json", KINDS),
        ('f"{effect_json} {file_sha256', 'f"{file_sha256', SAVED),
        ("if unmatched := sorted(expected.keys() ^ tensors.keys()):", "if unmatched := []:", SAVED),
        ("        modules_to_save.unload(opened)", "        pass", SAVED),
        ("        modules_to_save.unload(opened)", "        opened.unload()", KINDS),
    ],
    "training/oom_retry.py": [
        ("        set_rng_states(rng_states)\n", "", FITTING),
        ("max(1, tokens // 2)", "tokens", FITTING),
        ("for number in range(1, MAX_HALVINGS + 2):", "for number in range(1, MAX_HALVINGS + 1):", FITTING),
        ("if number == MAX_HALVINGS else", "if number == 1 else", FITTING),
        ("    set_gradient_checkpointing(model, len(layers))\n", "", FITTING),
        ("self.out_of_memory = is_out_of_memory(error)", "self.out_of_memory = True", FITTING),
    ],
    "training/reference_pass.py": [
        ("seen, verified = select_items(pairs, prepared.order.seen_indices)", "seen, verified = pairs[:4]", KINDS),
        ("    if recipe.starts_as_reference:", "    if False:", REFERENCE + " " + KINDS),
    ],
    "training/prepare.py": [
        ("if vocabulary_fingerprint(load_tokenizer(model)) != vocabulary_fingerprint(tokenizer):", "if False:", KINDS),
        ("table.ref_model_sync_steps > order.total_steps", "False", KINDS),
    ],
    "training/checkpoint/state.py": [
        ("self.first_step_grad = totals.grad / batch_size", "self.first_step_grad = totals.grad", WATCH),
        ("self.since_eval.add(totals)", "pass", WATCH),
        ("self.skipped_in_a_row + 1 if skipped else 0", "self.skipped_in_a_row + skipped", LOOP),
        ('{"first_slope": "first_step_grad", "vanished": "small_grad_pairs"}', "{}", CHECKPOINT),
    ],
    "preference/packing_choice.py": [
        ("if not _allclose(packed_P2, expected_P2, device):", "if False:", PACK),
        ("    _check_finite(expected_P2, device)\n", "", PACK),
        ("if _leaks_across_spans(model, pairs, packed, device):", "if False:", PACK),
        ("unwrap_peft(model).set_attn_implementation(before)", "pass", PACK),
    ],
    "model/packed/attention.py": [
        ("triu(keys - queries + 1)", "triu(keys - queries + 2)", PACK),
        (".tril(keys - queries - window)", ".tril(keys - queries - window - 1)", PACK),
        ("key_k <= last_Sq1 - window", "key_k < last_Sq1 - window", PACK),
        ("hidden_Sqk = key_k > last_Sq1", "hidden_Sqk = key_k > last_Sq1 + 1", PACK),
        ("keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))", "pass", PACK),
        ('kwargs.get("scaling") or query.shape[-1] ** -0.5', "query.shape[-1] ** -0.5 * 2", PACK),
    ],
    "model/packed/recurrent.py": [
        ("span.prefix[-1][1] - 1 if span.prefix else -1", "span.start - 1", RECURRENT),
        ("states |= dict(zip(batch, last, strict=True))", "states = dict(zip(batch, last, strict=True))", RECURRENT),
        ("(taps_TK != near_TK).any(1)", "(taps_TK != near_TK).all(1)", RECURRENT),
        ("fixed_CF = fixed_CF + bias_C[:, None]", "pass", RECURRENT),
        (".clamp(*dt_limit)", "", RECURRENT),
    ],
    "model/packed/span.py": [
        ("earlier = ((self.start, start),) if start > self.start else ()", "earlier = ()", PACK),
    ],
    "model/packed/buckets.py": [
        ("place_T[tile.start : tile.stop] = query_offset", "place_T[tile.start : tile.stop] = 0", PACK),
        ("key_slots.append(key_offset + s * k", "key_slots.append(s * k", PACK),
        ('kind="stable")], np.bincount(token_N)', 'kind="stable")][::-1], np.bincount(token_N)', PACK),
    ],
    "model/packed/gather.py": [
        ("index_copy_(0, place_T, gradient_TW)", "clone()", PACK),
        (
            "return gradient_QW.index_select(0, place_T)",
            "return gradient_QW[: len(place_T)]",
            PACK,
        ),
    ],
    "model/quantized.py": [
        ("(state.SCB.float() / 127)", "(state.SCB.float() / 128)", "model/test_quantizations.py"),
        (
            "return gradient @ dense_weight(ctx.layer, gradient.dtype), None",
            "return gradient, None",
            "model/test_quantizations.py",
        ),
        ("        layer.forward = partial(_forward, layer)", "        pass", "model/test_quantizations.py"),
        ("    state.dtype = dtype\n", "", "model/test_base.py"),
    ],
    "model/dora.py": [
        ("alpha=scaling)", "alpha=1.0)", "model/test_dora.py"),
        ("(scale_O - 1) * base_TO", "scale_O * base_TO", "model/test_dora.py"),
        ("delta_TO.to(base_output_TO.dtype)", "delta_TO", "model/test_dora.py"),
    ],
    "model/modules_to_save.py": [
        ('path == name or path.endswith(f".{name}")', "path.endswith(name)", "model/test_modules_to_save.py"),
    ],
    "model/cast_output.py": [
        ("return output.to(self.dtype)", "return output", "model/test_modules_to_save.py"),
    ],
    "model/fused_lora_ops.py": [
        ('scaled_Tr = low_Tr * layer.scaling["default"]', "scaled_Tr = low_Tr", LEAN),
        (
            "return (scaled_Tr @ b_Or.T).addmm_(x_TI, dense_weight(base, dtype).T)",
            "return base_output(base, dtype, x_TI).addmm_(scaled_Tr, b_Or.T)",
            LEAN,
        ),
        (
            "return nn.functional.linear(x_TIr, weight_OIr, base.bias.to(dtype))",
            "return base_output(base, dtype, x_TI).addmm_(scaled_Tr, b_Or.T)",
            LEAN,
        ),
        (
            'grads_Tr.append((grad_TO @ b_Or).mul_(layer.scaling["default"]))',
            "grads_Tr.append(grad_TO @ b_Or)",
            LEAN,
        ),
        ("grad_TI = grad_TR @ weights[0]", "grad_TI = torch.zeros_like(grad_TR @ weights[0])", LEAN),
        ("return activated_TO * up_TO, grad_gate_TO", "return activated_TO, grad_gate_TO", LEAN),
        ("* inverse_T1**3", "* inverse_T1**2", LEAN),
    ],
    "training/loop.py": [
        ("        tools.schedule.step()", "        pass", LOOP),
        (
            "context.data_order.batch_indices(state.step + 1)",
            "context.data_order.batch_indices(state.step or 1)",
            "faults/test_not_finite.py",
        ),
        ("optim.restore_scheduler(tools.schedule, tools.optimizer, state.scheduler)", "pass", CHECKPOINT),
        ("    sync_reference(loop.model, context.reference_adapter, state.step)\n", "", KINDS),
        (
            "        set_rng_states(rng_states)\n        scaler.update",
            "        scaler.update",
            "training/test_loss_scale.py",
        ),
        ("or state.has_stepped or result.nonfinite or", "or result.nonfinite or", "training/test_loss_scale.py"),
        ("or state.has_stepped or result.nonfinite or", "or state.has_stepped or", "training/test_loss_scale.py"),
        ("        load_ema_reference(checkpoint, ema_weights)", "        pass", MOVING),
        ("        train.set_reference(indices, result.reference_P2)\n", "", REFERENCE),
        ("    loop.window.add(result.metrics)\n", "", LOOP),
        (
            "    model.train()\n    is_limited",
            "    is_limited",
            LOOP + " model/test_fused_lora.py faults/test_resumes.py",
        ),
        ("checkpointable_layers(model), context.planned_bytes)", "[], context.planned_bytes)", "cli/test_check.py"),
    ],
    "training/watch.py": [
        ("lost > MAX_DISPLACEMENT_NATS and", "lost > MAX_DISPLACEMENT_NATS or", WATCH),
        ('first["eval_logps/chosen_per_token"] - now[', 'now["eval_logps/chosen_per_token"] - first[', WATCH),
        ('now["eval_kl"] - max(0.0, -lost) >', 'now["eval_kl"] >', WATCH),
        ('now["eval_kl"] - max(0.0, -lost) >', 'now["eval_kl"] + lost >', WATCH),
        ("and done >= 0.5", "", WATCH),
        ('abs(now.get("eval_length_correlation", 0.0))', 'now.get("eval_length_correlation", 0.0)', WATCH),
        ("return best if rises and falls and", "return best if rises and", WATCH),
        ("> error else None", "> 0 else None", WATCH),
        ("MAX_SKIPPED_SHARE * now", "0.5 * now", WATCH),
        ("if share > 0.5}", "}", WATCH),
    ],
    "training/checkpoint/best.py": [
        ("lowest, waited = min(lowest, now), 0 if better", "lowest, waited = now, 0 if better", BEST),
        ("better = lowest - now > 0", "better = lowest >= now", BEST),
        ("float(found) if metric in LOWER_IS_BETTER else -float(found)", "float(found)", BEST),
        ("min(lowest, now), 0 if better", "now, 0 if better", BEST),
        ("parameters[name].copy_(tensor)", "pass", BEST),
        ("if folder.name not in needed:", "if False:", BEST),
        ("if folder.name not in needed:", "if True:", BEST),
    ],
    "training/run.py": [
        ("processes.world_size() > 1 or ", "", "preference/test_start_evaluation.py"),
        (" or engine_of(recipe).is_trl:", ":", "preference/test_start_evaluation.py"),
    ],
    "files.py": [
        ("[version(name) for name in libraries]", "libraries", "model/test_tokenizer.py"),
        ('if kept["digest"] == _digest(record) else None', "", "preference/test_start_evaluation.py"),
    ],
    "model/tokenizer.py": [
        ("SPLIT_TEXTS, digests]", "SPLIT_TEXTS]", "model/test_tokenizer.py"),
    ],
    "training/memory/footprint.py": [
        ("[_code_digest(), key]", "[key]", "training/test_row_plan.py"),
    ],
    "preference/start_evaluation.py": [
        ("if not recipe.starts_as_reference or", "if", "preference/test_start_evaluation.py"),
        (" or isinstance(recipe.reference, EmaReference):", ":", "preference/test_start_evaluation.py"),
        ("[FORMAT, data_fingerprint(heldout), values,", "[FORMAT, values,", "preference/test_start_evaluation.py"),
    ],
    "preference/kl.py": [
        ("policy_cV.exp() * (policy_cV - base_cV)", "base_cV.exp() * (policy_cV - base_cV)", WATCH),
        ("pairs_without_rejected(pairs[:max_pairs])", "pairs[:max_pairs]", WATCH),
        ("return total / tokens", "return total / len(measured_pairs)", WATCH),
    ],
    "training/train_step.py": [
        ("context.data_order.batch_indices(state.step + 1)", "context.data_order.batch_indices(state.step or 1)", LOOP),
        ("grad < SMALL_GRAD * state.first_step_grad", "grad < SMALL_GRAD", WATCH),
        ("        parameter.grad = None\n", "        pass\n", LOOP + " " + FITTING),
        ("backward(losses.total_P.sum() / len(batch))", "backward(losses.total_P.mean())", LOOP),
        (
            "batch_reference_logps(step.model, batch, context.device, context.reference_adapter), []",
            "batch_reference_logps(step.model, batch, context.device), []",
            KINDS,
        ),
        (
            "batch_reference_logps(step.model, batch, context.device, context.reference_adapter), unknown",
            "batch_reference_logps(step.model, batch, context.device), unknown",
            KINDS,
        ),
        ("metrics=context.is_logged(step.number)", "metrics=False", LOOP),
        ("backward(losses.total_P.sum() / len(batch))", "backward(losses.total_P.sum())", LOOP),
        ("        set_rng_states(rng)", "        pass", "preference/test_losses.py"),
        ("        first += len(group)", "        pass", "preference/test_losses.py"),
        (
            "needs_whole_step(context.recipe.objective) and (len(groups) > 1 or processes.world_size() > 1)",
            "False",
            "preference/test_losses.py",
        ),
        ("self.tokens += output.tokens", "self.tokens += 1", LOOP + " training/test_trl_engine.py"),
    ],
    "training/data_order.py": [
        ("if self.total_steps >= self.steps_per_epoch:", "if True:", "training/test_data_order.py"),
        ("step == self.total_steps or is_due(", "is_due(", LOOP),
        (
            "math.ceil(self.num_pairs / self.batch_size)",
            "self.num_pairs // self.batch_size",
            "training/test_data_order.py training/test_loop.py",
        ),
        ("seed * 1_000_003 + epoch", "seed * 1_000_003", "training/test_data_order.py"),
        ("step - 1, self.steps_per_epoch", "step, self.steps_per_epoch", "training/test_data_order.py"),
    ],
    "training/evaluate.py": [
        ("is_interim = 0 < state.step <", "is_interim = 0 <= state.step <", "training/test_sweep.py"),
        ("context.interim_eval_pairs if is_interim else None", "None", "training/test_sweep.py"),
        ("        state.row_tokens = fitting.token_budget\n", "        pass\n", FITTING),
        ("logps.chosen_tokens_P - logps.rejected_tokens_P", "logps.chosen_tokens_P", WATCH),
        ("/ pairs**0.5", "", WATCH),
        ("    model.eval()\n", "", "training/test_loop.py faults/test_resumes.py training/test_checkpoint.py"),
        ("data.reference_P2[group]", "data.reference_P2[: len(group)]", LOOP),
        ("model.train(was_training)", "pass", LOOP),
    ],
    "model/device.py": [
        ("allow_fp16_reduced_precision_reduction = False", "allow_fp16_reduced_precision_reduction = True", DEVICE),
        ('case "bf16" if not ampere:', 'case "bf16" if False:', DEVICE),
    ],
    "errors.py": [
        ('any(f"{kind.__module__}.{kind.__name__}" ==', 'any(f"{kind.__module__}" ==', "cli/test_out_of_memory.py"),
        ('"cublas_status_alloc_failed"', '"cublas_status_other"', "cli/test_out_of_memory.py"),
    ],
    "training/nonfinite.py": [
        ("(overflows and not scaled) or", "", LOOP),
        (" or (nonfinite_rows and not overflows)", "", LOOP),
        (">= MAX_SKIPPED_STEPS", "> MAX_SKIPPED_STEPS", LOOP),
        ("return scale / 2", "return scale / 4", "training/test_loss_scale.py"),
        ("MIN_LOSS_SCALE = 1.0", "MIN_LOSS_SCALE = 512.0", "training/test_loss_scale.py"),
    ],
    "training/checkpoint/save.py": [
        ('    "heldout": "the held-out pairs",', "", "training/test_interrupts.py"),
        ("    if key not in PATH_KEYS:", "    if True:", "training/test_interrupts.py"),
        ('set_rng_states(load_file(folder / "random.safetensors"))', "pass", CHECKPOINT),
        (
            'moments[f"{key}|{name}"] = torch.as_tensor(value)',
            'moments[f"{key}|{name}"] = torch.as_tensor(value) * (key != "exp_avg_sq")',
            CHECKPOINT,
        ),
        ("            parameters[name].copy_(value)", "            pass", CHECKPOINT),
        ("optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)", "value", CHECKPOINT),
        ("if nonfinite := nonfinite_names(adapter | moments):", "if nonfinite := []:", CHECKPOINT),
        ("if not checkpoint_damage(folder)][:SAVE_TOTAL_LIMIT]", "][:SAVE_TOTAL_LIMIT]", CHECKPOINT),
        ("if state.fingerprints.get(name) != current.fingerprints.get(name)", "if False", CHECKPOINT),
        ("not key.startswith(MUTABLE_KEYS)", 'not key.startswith((*MUTABLE_KEYS, "objective."))', CHECKPOINT),
    ],
    "deploy/gguf_tensors.py": [
        ("if tensor.heads is not None:", "if False:", "deploy/test_export.py"),
        ("return int(config.num_key_value_heads)", "return int(config.num_attention_heads)", "deploy/test_export.py"),
    ],
    "deploy/hub_files.py": [
        ("_check_no_secrets(file, folder)\n    model_names", "model_names", "deploy/test_push.py"),
        ("redact_secrets(scrub(text))", "scrub(text)", "deploy/test_push.py"),
        ('| {"base_model_name_or_path": base}', "", "deploy/test_push.py"),
    ],
    "deploy/merged_weights.py": [
        ("weight_OI.addmm_(_to(b, weight), _to(a, weight), alpha=layer.scaling[name])", "pass", MERGE),
        ("weight_OI.mul_((magnitude_O / weight_OI.norm(dim=1))[:, None])", "pass", MERGE),
        (
            "if name in (layer.lora_embedding_A if embedding",
            "if name == 'default' and name in (layer.lora_embedding_A if embedding",
            MERGE,
        ),
    ],
    "deploy/rounding.py": [
        ("torch.where(takes_other, other, nearest)", "nearest", "deploy/test_rounding.py"),
        ("exact.abs() > value.abs()", "exact > value", "deploy/test_rounding.py"),
    ],
    "deploy/gguf_families.py": [
        ("norm_offset=1.0", "norm_offset=0.0", "deploy/test_gguf_families.py"),
        ("writer.add_logit_scale(config.logits_scaling)", "pass", "deploy/test_gguf_families.py"),
    ],
    "deploy/gguf_adapter.py": [
        ("scaled_OR = rope_permuted(scaled_OR, heads)", "pass", "deploy/test_gguf_adapter.py"),
        ("(layer.scaling[adapter] * len(a_RI))", "layer.scaling[adapter]", "deploy/test_gguf_adapter.py"),
    ],
    "data/rows/supervised.py": [
        ("for place in places[-1:] if last_only else places:", "for place in places:", "data/test_supervised.py"),
        ("in range(first, len(chat))", "in range(len(chat))", "data/test_supervised.py"),
    ],
    "deploy/shards.py": [
        ("[end, *ends]", "ends", "cli/test_chat_templates.py"),
        ('original if onto == "original" else None)\n', "original)\n", MERGE),
        ("if changed is None:", "if True:", MERGE),
    ],
    "deploy/base_choice.py": [
        ('metrics["kl"] > self.max_kl', "False", MERGE),
        ('one["merged_accuracy"] >= other["merged_accuracy"]', "True", MERGE),
    ],
    "deploy/merge.py": [
        ('onto == "trained" and kl > max_kl', "False", MERGE),
        ("if reason := beyond_delta_weights(vars(config)):", 'if reason := "":', "deploy/test_foreign_adapters.py"),
    ],
    "manifest.py": [
        ('if file_sha256(folder / name) != expected["sha256"]:', "if False:", CHECKPOINT),
        ('return "" if required in manifest', 'return "" if True', CHECKPOINT),
    ],
}


class Mutant(NamedTuple):
    """A mistake: in `file` of the package, `old` becomes `new`; `tests` ought to find it."""

    file: str
    old: str
    new: str
    tests: str


class Outcome(NamedTuple):
    """How a run of pytest ended: its exit code, and the first test that failed."""

    code: int
    failed: str


def main() -> int:
    """Plant the mistakes of all files, or of those whose name ends with an argument."""
    parser = argparse.ArgumentParser(description="Plant mistakes and see whether the suite finds them.")
    parser.add_argument("files", nargs="*", help="ends of names of files, such as pack.py; all if there are none")
    parser.add_argument("--output", type=Path, help="write the lines to this file too")
    parser.add_argument("--workers", type=int, default=2, help="how many mistakes are tried at once (2)")
    options = parser.parse_args()
    mutants = [
        Mutant(file, *mutant)
        for file, of_file in MUTANTS.items()
        for mutant in of_file
        if not options.files or any(file.endswith(end) for end in options.files)
    ]
    lines = list[str]()

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.output:
            options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    return 0 if run_mutants(mutants, options.workers, say) else 1


def run_mutants(
    mutants: Sequence[Mutant], workers: int, say: Callable[[str], None], preload: Sequence[str] = PRELOAD
) -> bool:
    """Try each mutant in workers that have imported `preload`; True if all were found."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        idle: Queue[Worker] = Queue()
        for number in range(workers):
            idle.put(Worker(copy_checkout(Path(work, str(number))), preload))

        def found(mutant: Mutant) -> bool:
            worker = idle.get()
            try:
                return worker.finds(mutant, say)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(found, mutants))
        while not idle.empty():
            idle.get().stop()
    say(f"{sum(results)} of {len(results)} planted mistakes were found, {time.monotonic() - start:.0f} s")
    return all(results)


def copy_checkout(folder: Path) -> Path:
    """Copy what git knows, or would know, of this checkout."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=HOME, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (HOME / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, folder / name)
    return folder


class Worker:
    """A copy of the checkout, and a process that forks to run its tests."""

    def __init__(self, home: Path, preload: Sequence[str]) -> None:
        self.home = home
        self.sound: dict[str, bool] = {}  # a test that failed: whether it passes without the mistake
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, home, preload))
        self.process.start()
        theirs.close()

    def finds(self, mutant: Mutant, say: Callable[[str], None]) -> bool:
        """True if a test fails with the mistake in place."""
        place, start = self.home / "qlora_dpo" / mutant.file, time.monotonic()
        text = place.read_text(encoding="utf-8")
        if mutant.old not in text:
            raise SystemExit(f"{mutant.file}: has no {mutant.old!r} any more; mend tests/mutations.py")
        mistaken = text.replace(mutant.old, mutant.new, 1)
        files = [f"tests/{name}" for name in mutant.tests.split()]
        try:
            place.write_text(mistaken, encoding="utf-8")
            outcome, how = self.run_forked(files), ""
            if outcome.failed:
                place.write_text(text, encoding="utf-8")
                if outcome.failed not in self.sound:
                    self.sound[outcome.failed] = self.run_forked([outcome.failed]).code == 0
                if not self.sound[outcome.failed]:
                    place.write_text(mistaken, encoding="utf-8")
                    outcome, how = run_cold(self.home, files), ", in a new process"
        finally:
            place.write_text(text, encoding="utf-8")
        mistake = f"{' '.join(mutant.old.split())[:60]!r} -> {' '.join(mutant.new.split())[:60]!r}"
        found = outcome.code in (1, 2)  # 2: the file of tests cannot even be imported
        verdict = f"found by {outcome.failed}{how}" if found else f"SURVIVES ({outcome.code})"
        say(f"{mutant.file}: {mistake}: {verdict}, {time.monotonic() - start:.0f} s")
        return found

    def run_forked(self, tests: list[str]) -> Outcome:
        self.connection.send(tests)
        return Outcome(*self.connection.recv())

    def stop(self) -> None:
        self.connection.close()
        self.process.join(60)


def serve(connection: Connection, home: Path, preload: Sequence[str]) -> None:
    """Import the libraries, and run the tests that are asked for, each time in a fork."""
    import importlib
    import warnings

    os.environ.update(PYTHONPATH=str(home), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", HF_HOME=str(home.with_name("hf")))
    os.chdir(home)
    ours = [path for path in sys.path if Path(path) == HOME or Path(path).is_relative_to(HOME / "tests")]
    sys.path[:] = [str(home), *(path for path in sys.path if path and path not in ours)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in preload:
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "qlora_dpo" for name in sys.modules)
    while True:
        try:
            tests = connection.recv()
        except EOFError:
            return
        connection.send(tuple(fork_pytest(tests, home)))


def fork_pytest(tests: list[str], home: Path) -> Outcome:
    """Run pytest in a fork of this process."""
    log = home.with_name(f"{home.name}.log")
    child = os.fork()
    if not child:
        os.setsid()  # so that what it leaves running can be ended with it
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 3
        try:
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", IMPORTED_BEFORE, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + TIMEOUT
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(1, "")
        time.sleep(0.02)
    return Outcome(os.waitstatus_to_exitcode(ended[1]), first_failure(log.read_text(errors="replace")))


def run_cold(home: Path, tests: list[str]) -> Outcome:
    """Run pytest in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, first_failure(done.stdout))


def first_failure(report: str) -> str:
    """The test that pytest's summary names first; "" if none failed."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", report, re.MULTILINE)
    return found[1] if found else ""


if __name__ == "__main__":
    sys.exit(main())
