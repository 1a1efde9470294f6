use std::collections::HashSet;
use std::io::Write;

use super::*;

fn options(change: impl FnOnce(&mut WorkloadOptions)) -> WorkloadOptions {
    let mut options = WorkloadOptions::default();
    change(&mut options);
    options
}

fn named(name: &str) -> Workload {
    Workload::new(&options(|o| o.name = Some(name.into()))).unwrap()
}

fn segments(job: &Job) -> &[Segment] {
    match &job.turns[0].content {
        Content::Random(segments) => segments,
        Content::Given(_) => panic!("given text"),
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn every_workload_of_the_list_can_be_had_and_keeps_within_its_bounds() {
    for (name, description) in list() {
        let workload = named(&name);
        assert_eq!(
            (workload.name.as_str(), workload.description.as_str()),
            (name.as_str(), description.as_str())
        );
        if let Some(arrivals) = &workload.arrivals {
            assert_eq!(arrivals.validate(), Ok(()), "{name}");
        }
        for job in workload.jobs(3).take(500) {
            let said: u32 = job.turns.iter().map(|turn| turn.content.tokens()).sum();
            let answered: u32 = job.turns.iter().map(|turn| turn.output_tokens).sum();
            let last = job.turns[job.turns.len() - 1].output_tokens;
            assert!(said >= 1 && said + answered - last <= workload.most_input, "{name}: {said}");
            assert!((1..=workload.most_output).contains(&last), "{name}: {last}");
        }
    }
}

#[test]
fn the_seed_decides_lengths_and_sharing() {
    for name in ["azure-chat", "mooncake-conversation", "shared-prefix", "multi-turn"] {
        let workload = named(name);
        let jobs = |seed| workload.jobs(seed).take(50).collect::<Vec<_>>();
        assert_eq!(jobs(1), jobs(1), "{name}");
        assert_ne!(jobs(1), jobs(2), "{name}");
    }
}

#[test]
fn random_prompts_share_nothing_and_have_the_lengths_asked_for() {
    let workload = Workload::new(&options(|o| {
        o.input = Some("10:20".parse().unwrap());
        o.output = Some("7".parse().unwrap());
    }))
    .unwrap();
    let jobs: Vec<Job> = workload.jobs(1).take(200).collect();
    let streams: HashSet<u64> = jobs.iter().map(|job| segments(job)[0].stream).collect();
    assert_eq!(streams.len(), 200);
    let lengths: HashSet<u32> = jobs.iter().map(|job| job.turns[0].content.tokens()).collect();
    assert_eq!(lengths, (10..=20).collect());
    assert!(jobs.iter().all(|job| job.turns[0].output_tokens == 7));
}

#[test]
fn shared_prefixes_are_drawn_from_as_many_as_there_are() {
    let workload = Workload::new(&options(|o| {
        o.name = Some("shared-prefix".into());
        (o.prefixes, o.prefix_tokens) = (Some(5), Some(100));
    }))
    .unwrap();
    let jobs: Vec<Job> = workload.jobs(1).take(200).collect();
    let prefixes: HashSet<u64> = jobs.iter().map(|job| segments(job)[0].stream).collect();
    assert_eq!(prefixes, (0..5).collect());
    assert!(jobs.iter().all(|job| segments(job)[0].tokens == 100 && segments(job)[1].tokens == 1200));
    assert_eq!(workload.most_input, 1300);
}

#[test]
fn conversations_have_turns_behind_one_system_prompt() {
    let workload = Workload::new(&options(|o| {
        o.name = Some("multi-turn".into());
        o.turns = Some("3:5".parse().unwrap());
        o.turn_think_time = Some(Duration::from_secs(2));
    }))
    .unwrap();
    assert!(workload.needs_text);
    let jobs: Vec<Job> = workload.jobs(1).take(100).collect();
    let turns: HashSet<usize> = jobs.iter().map(|job| job.turns.len()).collect();
    assert_eq!(turns, HashSet::from([3, 4, 5]));
    for job in &jobs {
        assert_eq!(segments(job)[0], Segment::of(0, 256));
        assert_eq!(job.turns[0].think, Duration::ZERO);
        assert!(job.turns[1..].iter().all(|turn| turn.think == Duration::from_secs(2)));
    }
}

#[test]
fn the_comparison_is_256_requests_at_once() {
    let workload = named("engine-comparison");
    assert_eq!(workload.jobs(0).count(), 256);
    assert_eq!((workload.requests, workload.arrivals), (Some(256), Some(ArrivalShape::AllAtOnce)));
    assert!(workload.is_whole);
}

#[test]
fn prompts_come_from_lines_or_json() {
    let file = file("What is it?\n\n{\"prompt\": \"Tell\\nme\", \"output_tokens\": 9}\r\nlast\n");
    let workload = Workload::new(&options(|o| o.prompts_file = Some(file.path().into()))).unwrap();
    let jobs: Vec<Job> = workload.jobs(0).collect();
    let texts: Vec<_> = jobs
        .iter()
        .map(|job| match &job.turns[0].content {
            Content::Given(text) => (text.to_string(), job.turns[0].output_tokens),
            Content::Random(_) => panic!("random"),
        })
        .collect();
    assert_eq!(texts, [("What is it?".into(), 128), ("Tell\nme".into(), 9), ("last".into(), 128)]);
    assert!(workload.is_given && !workload.ignore_eos && workload.requests == Some(3));
}

#[test]
fn a_trace_is_replayed_at_the_speed_asked_for() {
    let file = file("0,10,5\n4,20,6\n");
    let workload = Workload::new(&options(|o| {
        o.trace_file = Some(file.path().into());
        o.trace_speed = Some(2.0);
    }))
    .unwrap();
    let Some(ArrivalShape::Trace { times }) = &workload.arrivals else { panic!("no trace") };
    assert_eq!(times[..], [Duration::ZERO, Duration::from_secs(2)]);
    assert_eq!((workload.most_input, workload.most_output, workload.requests), (20, 6, Some(2)));
}

#[test]
fn what_does_not_fit_the_context_is_refused_cut_or_shrunk() {
    let chat = || named("azure-chat");
    let error = chat().within(4096, Fit::Refuse).unwrap_err().to_string();
    assert!(error.contains("14050 + 1000 tokens") && error.contains("4096"), "{error}");
    assert!(chat().within(20_000, Fit::Refuse).is_ok());
    for fit in [Fit::Clip, Fit::Scale] {
        let workload = chat().within(1000, fit).unwrap();
        let lengths: Vec<(u32, u32)> = workload
            .jobs(1)
            .take(2000)
            .map(|job| (job.turns[0].content.tokens(), job.turns[0].output_tokens))
            .collect();
        assert!(lengths.iter().all(|(input, output)| *input >= 1 && *output >= 1 && input + output <= 1000));
        assert!(u64::from(workload.most_input) + u64::from(workload.most_output) <= 1000);
        let full = lengths.iter().filter(|(input, output)| input + output == 1000).count();
        // Half of the prompts alone are longer than that; scaled, one in thousands is.
        assert_eq!(full > 500, fit == Fit::Clip, "{fit:?}: {full}");
    }
}

#[test]
fn scaled_prefixes_are_still_shared() {
    let workload = named("shared-prefix").within(1000, Fit::Scale).unwrap();
    let jobs: Vec<Job> = workload.jobs(1).take(300).collect();
    assert!(jobs.iter().all(|job| segments(job)[0].tokens == segments(&jobs[0])[0].tokens));
    let long = Segment { stream: 1, start: 512, tokens: 512 };
    let job = scale(Job::single(Content::Random(vec![Segment::of(1, 512), long]), 10), 0.1);
    assert_eq!(segments(&job), [Segment::of(1, 51), Segment { stream: 1, start: 51, tokens: 51 }]);
}

#[test]
fn a_conversation_that_is_too_long_loses_its_last_turns() {
    let turn = |tokens| crate::prompt::Turn {
        content: Content::Random(vec![Segment::of(1, tokens)]),
        output_tokens: 10,
        think: Duration::ZERO,
    };
    let job = clip(Job { turns: vec![turn(40), turn(40), turn(40)] }, 100);
    let lengths: Vec<u32> = job.turns.iter().map(|turn| turn.content.tokens()).collect();
    // 40 + 10 asked and answered, then 40 + 10, and nothing is left.
    assert_eq!(lengths, [40, 40]);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    type Change = fn(&mut WorkloadOptions);
    let bad: [(Change, &str); 8] = [
        (|o| o.name = Some("azure".into()), "\"azure\" is unknown; there are random, multi-turn"),
        (|o| o.prefixes = Some(3), "--prefixes does not go with the workload random"),
        (
            |o| (o.name, o.input) = (Some("azure-chat".into()), Some(Span::exactly(5))),
            "--input-tokens does not go",
        ),
        (|o| (o.name, o.prefixes) = (Some("shared-prefix".into()), Some(0)), "--prefixes is 0"),
        (|o| (o.name, o.turns) = (Some("multi-turn".into()), Some(Span::exactly(2000))), "--turns is 2000"),
        (|o| o.prompts_file = Some("/no/such/file".into()), "cannot read /no/such/file"),
        (|o| (o.name, o.trace_file) = (Some("random".into()), Some("x".into())), "exclude each other"),
        (|o| (o.trace_file, o.trace_speed) = (Some("x".into()), Some(0.0)), "--trace-speed is 0"),
    ];
    for (change, part) in bad {
        let error = Workload::new(&options(change)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
