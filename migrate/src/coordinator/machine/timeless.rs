//! For the model: a machine whose times do not grow, and what of them makes a difference.

use std::time::Duration;

use super::{After, Asking, Before, LEASE, MARGIN, Machine, Offer, RollingBack, State};

impl Machine {
    /// Shifts all times so that what was `now` is `new` from here on. What has passed is forgotten as far as it makes
    /// no difference any more.
    pub(in crate::coordinator) fn rebase(&mut self, now: Duration, new: Duration) {
        let shifted = |time: Duration| (time + new).saturating_sub(now);
        if let Some(offer) = self.state.offer() {
            offer.came = shifted(offer.came).max(new.saturating_sub(LEASE + MARGIN));
        }
        let deadline = |time: &mut Duration| *time = shifted(*time).max(new);
        deadline(&mut self.prepare_until);
        self.state.deadlines().into_iter().for_each(deadline);
    }

    /// Everything that makes a difference, without times: only what has passed and what has not. Also the offer that
    /// no target takes up any more.
    pub(in crate::coordinator) fn essence(&self, now: Duration) -> (String, Option<Option<u32>>) {
        let mut state = self.state.clone();
        let mut over = None;
        if let Some(offer) = state.offer() {
            let (lease, margin) = (offer.came + LEASE <= now, offer.came + LEASE + MARGIN <= now);
            over = margin.then_some(offer.number);
            offer.came = Duration::from_secs(u64::from(lease) + u64::from(margin));
        }
        for time in state.deadlines() {
            *time = Duration::from_secs(u64::from(*time <= now));
        }
        if let Some(asking) = state.asking() {
            asking.trouble = None;
        }
        (format!("{state:?} {}", self.doubt.is_some()), over)
    }
}

impl State {
    fn offer(&mut self) -> Option<&mut Offer> {
        match self {
            Self::Before(Before::Flipping { offer, .. })
            | Self::After(After::Starting { offer, .. } | After::Confirming { offer, .. }) => Some(offer),
            _ => None,
        }
    }

    fn asking(&mut self) -> Option<&mut Asking> {
        match self {
            Self::After(
                After::Starting { go: asking, .. }
                | After::Confirming { confirm: asking, .. }
                | After::Releasing(asking),
            )
            | Self::RollingBack(RollingBack { asking, .. }) => Some(asking),
            Self::Before(_) | Self::Finished { .. } => None,
        }
    }

    fn deadlines(&mut self) -> Vec<&mut Duration> {
        if let Self::Before(Before::Moving { deadline, .. } | Before::HoldingNew { until: deadline, .. }) =
            self
        {
            return vec![deadline];
        }
        self.asking()
            .map(|asking| [Some(&mut asking.give_up), asking.retry.as_mut()].into_iter().flatten().collect())
            .unwrap_or_default()
    }
}
