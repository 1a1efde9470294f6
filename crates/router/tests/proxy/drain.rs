//! Told to stop, the router takes nothing new, lets what runs end, and cuts what is left when the time is over.

use std::time::Duration;

use crate::util::{Backend, Behaviour, PATIENCE, Routed, options, until};

#[tokio::test]
async fn running_answers_end_and_new_ones_are_refused() {
    let backend = Backend::start(Behaviour::Hang);
    let mut routed = Routed::before(&[&backend]).await;
    let running = routed.ask(true).send();
    let running = tokio::spawn(running);
    until(async || backend.inside() == 1).await;
    routed.stop();
    until(async || routed.get("/ready").send().await.unwrap().status().as_u16() == 503).await;
    assert_eq!(routed.ask(false).send().await.unwrap().status().as_u16(), 503);
    assert!(!running.is_finished() && !routed.task.is_finished());
    running.abort();
    tokio::time::timeout(PATIENCE, &mut routed.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_left_when_the_time_is_over_ends_with_an_event_that_says_so() {
    let backend = Backend::start(Behaviour::Stall);
    let mut options = options(&[&backend]);
    options.drain_timeout = Duration::from_millis(200);
    let mut routed = Routed::start(options, 1).await;
    let streaming = routed.ask(true).send().await.unwrap();
    routed.stop();
    let text = tokio::time::timeout(PATIENCE, streaming.text()).await.unwrap().unwrap();
    assert!(text.contains("shutting_down") && !text.contains("[DONE]"), "{text}");
    tokio::time::timeout(PATIENCE, &mut routed.task).await.unwrap().unwrap();
    until(async || backend.inside() == 0).await;
}
