use servelab_sim::{Assumptions, HardwareProfile, plan};

use super::calculation::{Calculation, On};
use super::evaluate::Inputs;
use super::row::{Needs, Source};
use super::view::Filter;
use super::*;
use crate::experiments::{
    Circumstances, ExperimentId, Finding, Interval, Ladder, LadderPoint, Measurement, Origin, Prediction,
    PredictionKind, SCHEMA_VERSION,
};

fn chosen(ledger: &Ledger, model: &str, hardware: &str) -> Chosen {
    Chosen { model: ledger.models[model].clone(), hardware: HardwareProfile::named(hardware).unwrap() }
}

fn on(model: &str, hardware: &str, gpus: u32) -> On {
    On {
        model: Some(model.into()),
        hardware: Some(hardware.into()),
        gpus: Some(gpus),
        weight_dtype: None,
        kv_dtype: None,
    }
}

/// Every figure of every row, recomputed, is the one that the row was written with, to its last place.
#[test]
fn the_arithmetic_of_every_row_gives_its_figures() {
    let ledger = Ledger::load().unwrap();
    let chosen = chosen(&ledger, "llama-3.1-8b", "h100");
    let mut checked = 0;
    for row in &ledger.rows {
        for figure in &row.arithmetic {
            let computed = figure.calculation.evaluate(ledger.inputs(&chosen)).unwrap();
            let error = (computed.value - figure.figure).abs();
            assert!(error <= 0.500_001 * figure.place, "{}: {computed:?} is not {}", row.id, figure.figure);
            checked += 1;
        }
    }
    assert!(checked >= 45, "{checked}");
}

/// The claim's own inputs do not depend on what the reader chose.
#[test]
fn the_arithmetic_of_a_quote_does_not_depend_on_the_choice() {
    let ledger = Ledger::load().unwrap();
    let (small, large) = (chosen(&ledger, "llama-3.1-8b", "l4"), chosen(&ledger, "llama-3.1-70b", "b200"));
    for figure in ledger.rows.iter().flat_map(|row| &row.arithmetic) {
        let value = |chosen| figure.calculation.evaluate(ledger.inputs(chosen)).unwrap().value;
        assert_eq!(value(&small), value(&large), "{figure:?}");
    }
}

#[test]
fn every_claim_of_the_two_texts_is_there() {
    let ledger = Ledger::load().unwrap();
    let expected = [
        "decode-70b",
        "decode-7b",
        "halving",
        "knee-32",
        "gpus-70b",
        "gpus-60s",
        "kv-70b",
        "kv-8b",
        "kv-mha",
        "kv-left",
        "qps-dau",
        "little",
        "cold-7b",
        "cold-70b",
        "prefix-10x",
        "least-req",
        "keda-zero",
        "starve",
        "ttft-1000",
        "semantic",
        "price",
        "p99-80",
        "voice",
        "fast-8b",
        "fast-70b",
    ];
    for id in expected {
        assert!(ledger.row(id).is_ok(), "{id}");
    }
    let questions = ledger.rows.iter().filter(|row| row.source == Source::Question).count();
    assert_eq!(ledger.rows.len(), expected.len() + questions);
    let message = ledger.row("decode").unwrap_err().to_string();
    assert!(message.contains("no row \"decode\"; there are decode-70b, decode-7b"), "{message}");
}

/// What a row shows is what its experiment finds; the experiments' own tests hold the other end.
#[test]
fn rows_with_an_experiment_say_what_of_it_they_show() {
    for row in Ledger::load().unwrap().rows {
        assert_eq!(row.experiment.is_some(), !row.shows.is_empty(), "{}", row.id);
        assert!(row.verdict.ends_with('.') && row.how.ends_with('.'), "{}", row.id);
        let known = row.experiment.map_or(&[][..], ExperimentId::findings);
        for key in &row.shows {
            assert!(known.contains(&key.as_str()), "{}: {key}", row.id);
        }
        if matches!(row.needs, Needs::ThisMachine | Needs::Fleet) {
            assert!(row.experiment.is_some(), "{} can be measured here, but by what?", row.id);
        }
        if let Some(experiment) = row.experiment {
            assert_eq!(experiment.is_simulated(), row.needs == Needs::Fleet, "{}", row.id);
        }
    }
}

#[test]
fn data_with_a_slip_is_refused_with_its_line() {
    let with = |from: &str, to: &str| {
        assert!(DATA.contains(from), "{from}");
        Ledger::parse(&DATA.replacen(from, to, 1)).unwrap_err().to_string()
    };
    assert!(with("topic = \"throughput\"", "topick = \"throughput\"").contains("unknown field `topick`"));
    let calculation = with("sequences = 32", "sequencies = 32");
    assert!(calculation.contains("line ") && calculation.contains("sequencies"), "{calculation}");
    assert!(with("gpus = 4", "gpu = 4").contains("unknown field `gpu`"));
    assert!(with("formula = \"weights\"", "formula = \"wait\"").contains("unknown variant `wait`"));
    assert!(with("standing = \"wrong\"", "standing = \"wrongish\"").contains("wrongish"));
    assert!(with("id = \"decode-7b\"", "id = \"decode-70b\"").contains("two rows are called \"decode-70b\""));
    assert!(with("kv_heads = 8", "kv_heads = 7").contains("kv_heads of model"));
}

/// The planner and the ledger count a fleet the same way.
#[test]
fn the_plan_of_a_row_is_that_of_the_planner() {
    let ledger = Ledger::load().unwrap();
    let chosen = chosen(&ledger, "llama-3.1-70b", "h100");
    let own = On { model: None, hardware: None, gpus: None, weight_dtype: None, kv_dtype: None };
    let computed = Calculation::Plan { on: own }.evaluate(ledger.inputs(&chosen)).unwrap();
    let planned = plan(&chosen.model, &chosen.hardware, &Assumptions::DEFAULT).unwrap();
    assert_eq!(computed.value, planned.fleet.gpus as f64);
}

#[test]
fn lengths_that_exceed_the_context_are_cut_to_it() {
    let ledger = Ledger::load().unwrap();
    let mut chosen = chosen(&ledger, "llama-3.1-8b", "h100");
    chosen.model.max_context_tokens = 1000;
    let inputs = ledger.inputs(&chosen);
    let own = On { model: None, ..on("", "h100", 1) };
    let ceiling = Calculation::DecodeCeiling { on: own.clone(), input_tokens: 2000, output_tokens: 500 };
    let computed = ceiling.evaluate(inputs).unwrap();
    assert!(computed.at.starts_with("500/500 tokens"), "{computed:?}");
    let prefill = Calculation::Prefill { on: own.clone(), tokens: 100_000 }.evaluate(inputs).unwrap();
    assert!(prefill.at.starts_with("1,000 tokens"), "{prefill:?}");
    let gain = Calculation::HitGain { on: own, uncached_tokens: 1200, total_tokens: 7200 };
    assert!(gain.evaluate(inputs).unwrap().at.starts_with("167 of 1,000 tokens"));
}

#[test]
fn a_model_that_fits_nowhere_has_no_limit_and_says_so() {
    let ledger = Ledger::load().unwrap();
    let mut chosen = chosen(&ledger, "llama-3.1-70b", "h100");
    chosen.hardware.interconnect = None;
    let view = LedgerView::new(&ledger, &chosen, &only("decode-70b"), &[]).unwrap();
    assert_eq!(view.rows[0].limits[0].line(), "full batch: llama-3.1-70b does not fit 1 x H100 SXM");
    let unknown = Calculation::KvBytes { on: on("gpt-9", "h100", 1) };
    let models = BTreeMap::new();
    let error = unknown.evaluate(Inputs { models: &models, chosen: &chosen }).unwrap_err();
    assert_eq!(error.to_string(), "the ledger has no model gpt-9");
}

// ---- as text ----

fn only(id: &str) -> Filter {
    Filter { ids: vec![id.to_owned()], needs: Vec::new() }
}

fn finding(key: &str, label: &str, unit: Unit, measured: f64) -> Finding {
    Finding {
        key: key.into(),
        label: label.into(),
        unit,
        prediction: None,
        measured,
        interval: None,
        note: None,
    }
}

/// A batch ladder as it might have been measured on some machine.
fn measurement(hardware: &str, unix_seconds: u64, half_batch: f64) -> Measurement {
    let ledger = Ledger::load().unwrap();
    let mut model = ledger.models["llama-3.1-8b"].clone();
    model.name = "small".into();
    let prediction = Prediction { value: 10.0, kind: PredictionKind::Equal, because: "W / (L x kv)".into() };
    let half = Finding {
        prediction: Some(prediction),
        interval: Some(Interval { low: 0.8 * half_batch, high: Some(1.3 * half_batch) }),
        ..finding("half_batch", "B_half", Unit::Sequences, half_batch)
    };
    let point = |sequences: f64| LadderPoint {
        sequences,
        tokens_per_second: 1000.0 * sequences / (sequences + half_batch),
    };
    Measurement {
        schema_version: SCHEMA_VERSION,
        experiment: ExperimentId::BatchLadder,
        unix_seconds,
        took_seconds: 12.0,
        circumstances: Circumstances {
            hardware: hardware.into(),
            is_gpu: false,
            limits: HardwareProfile::named("l4").unwrap(),
            model,
            weights: "random weights".into(),
            busy_share: None,
            origin: Origin {
                os: "linux".into(),
                tool_version: "0.1.0".into(),
                tool_commit: Some("abc".into()),
            },
        },
        server_flags: vec![],
        findings: vec![
            half,
            finding("asymptote_tokens_per_second", "asymptote", Unit::TokensPerSecond, 1000.0),
        ],
        ladder: Some(Ladder {
            context_tokens: 96.0,
            points: [1.0, 2.0, 4.0, 8.0, 16.0, 32.0].map(point).to_vec(),
            half_batch,
            most_tokens_per_second: 1000.0,
            predicted: vec![(1.0, 90.0), (32.0, 900.0)],
        }),
    }
}

fn view(filter: &Filter, measurements: &[Measurement]) -> LedgerView {
    let ledger = Ledger::load().unwrap();
    LedgerView::new(&ledger, &chosen(&ledger, "llama-3.1-8b", "h100"), filter, measurements).unwrap()
}

#[test]
fn the_newest_measurement_of_each_place_is_shown() {
    let measurements =
        [measurement("box", 100, 5.0), measurement("box", 200, 6.0), measurement("other", 50, 7.0)];
    let shown = view(&only("knee-32"), &measurements);
    let values: Vec<(&str, f64)> = shown.rows[0]
        .measured
        .iter()
        .map(|view| (view.hardware.as_str(), view.findings[0].measured))
        .collect();
    assert_eq!(values, [("box", 6.0), ("other", 7.0)]);
}

#[test]
fn what_was_measured_on_a_processor_says_nothing_about_a_gpu() {
    let mut measured = measurement("box", 100, 5.0);
    assert!(view(&only("decode-7b"), &[measured.clone()]).rows[0].measured.is_empty());
    measured.circumstances.is_gpu = true;
    assert_eq!(view(&only("decode-7b"), &[measured]).rows[0].measured.len(), 1);
}

#[test]
fn rows_are_chosen_by_what_they_need() {
    let filter = Filter { ids: Vec::new(), needs: vec![Needs::Nothing] };
    let ids: Vec<String> = view(&filter, &[]).rows.into_iter().map(|row| row.id).collect();
    assert_eq!(ids, ["gpus-60s", "kv-mha", "fast-8b", "fast-70b"]);
    let ledger = Ledger::load().unwrap();
    let chosen = chosen(&ledger, "llama-3.1-8b", "h100");
    assert!(LedgerView::new(&ledger, &chosen, &only("nope"), &[]).is_err());
}

#[test]
fn a_terminal_of_100_columns_holds_every_line() {
    let measurements = [measurement("AMD EPYC 9R14 96-Core Processor, 2 threads", 1_764_000_000, 5.0)];
    for detail in [false, true] {
        for (model, hardware) in [("llama-3.1-8b", "h100"), ("llama-3.1-70b", "l4")] {
            let ledger = Ledger::load().unwrap();
            let chosen = chosen(&ledger, model, hardware);
            let view = LedgerView::new(&ledger, &chosen, &Filter::default(), &measurements).unwrap();
            let text = terminal::text(&view, detail, false);
            for line in text.lines() {
                assert!(line.chars().count() <= terminal::WIDTH, "{line}");
            }
        }
    }
}

#[test]
fn a_row_in_a_terminal_is_as_reviewed() {
    let measurements = [measurement("a machine", 1_764_000_000, 5.0)];
    insta::assert_snapshot!(terminal::text(&view(&only("knee-32"), &measurements), true, false));
}

#[test]
fn a_row_in_markdown_is_as_reviewed() {
    let measurements = [measurement("a machine", 1_764_000_000, 5.0)];
    insta::assert_snapshot!(markdown::text(&view(&only("knee-32"), &measurements)));
}

#[test]
fn colours_only_add_to_the_text() {
    let view = view(&Filter::default(), &[]);
    let coloured = terminal::text(&view, false, true);
    let mut plain = String::new();
    let mut parts = coloured.split('\u{1b}');
    plain += parts.next().unwrap();
    for part in parts {
        plain += part.split_once('m').unwrap().1;
    }
    assert_ne!(coloured, plain);
    assert_eq!(plain, terminal::text(&view, false, false));
}

#[test]
fn json_has_the_numbers_behind_the_text() {
    let json = serde_json::to_value(view(&only("knee-32"), &[measurement("box", 100, 5.0)])).unwrap();
    let row = &json["rows"][0];
    assert_eq!((&row["id"], &row["standing"]), (&"knee-32".into(), &"wrong".into()));
    assert_eq!(row["arithmetic"][1]["formula"], "F3");
    assert!(row["arithmetic"][1]["value"].as_f64().unwrap() > 476.0);
    assert_eq!(row["measured"][0]["findings"][0]["measured"], 5.0);
}

/// Well-formed, loads nothing, and nothing that others named ends an element.
#[test]
fn the_page_is_self_contained_and_escaped() {
    let hostile = "</script><img src=x onerror=alert(1)>";
    let mut measured = measurement(hostile, 1_764_000_000, 5.0);
    measured.circumstances.model.name = hostile.into();
    measured.circumstances.weights = hostile.into();
    measured.findings[0].note = Some(hostile.into());
    let ledger = Ledger::load().unwrap();
    let mut chosen = chosen(&ledger, "llama-3.1-8b", "h100");
    chosen.hardware.name = "<b>gpu</b>".into();
    let view = LedgerView::new(&ledger, &chosen, &Filter::default(), &[measured]).unwrap();
    let page = html::page(&view).unwrap();
    assert!(!page.contains("<img") && !page.contains("<b>gpu"), "not escaped");
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;"));
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(&page, options).unwrap();
    let claims =
        document.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/1999/xhtml", "details")));
    assert_eq!(claims.count(), ledger.rows.len());
    for node in document.descendants() {
        for attribute in node.attributes().filter(|attribute| ["src", "href"].contains(&attribute.name())) {
            assert!(attribute.value().starts_with('#'), "{attribute:?}");
        }
    }
    for row in &view.rows {
        for figure in row.arithmetic.iter().chain(&row.limits) {
            if let view::FigureView::Computed { text, .. } = figure {
                assert!(page.contains(text.as_str()), "{}: {text}", row.id);
            }
        }
    }
    assert!(page.len() < 400_000, "{}", page.len());
}
