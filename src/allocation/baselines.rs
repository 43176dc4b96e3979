//! The paper's own algorithm, and the random choices it is compared with.
//!
//! Block coordinate descent (arXiv 2504.14667): greedy subchannels, then power control, then the cut by exhaustion at the rates
//! reached, then the rank likewise, again and again until the delay stops falling. The paper's power control introduces auxiliary
//! variables to make the problem convex and hands it to a solver; the optimum is the one of `power`. Alternation can rise, so
//! the best iterate is the answer.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bound::Ladders;
use super::channel::Channel;
use super::delay::Problem;
use super::power::{Demand, LinkPlan, control};
use super::search::{Links, Solved};
use super::subchannel::greedy;
use super::{Choice, Error, LinkName, Method};

/// Alternations after which descent is given up; it takes two or three.
const MAX_ITERATIONS: usize = 30;

/// What a random baseline leaves to chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Random {
    links: bool,
    split: bool,
    rank: bool,
}

impl Random {
    fn of(method: Method) -> Self {
        let (links, split, rank) = match method {
            Method::A => (true, true, true),
            Method::B => (true, false, false),
            Method::C => (false, true, false),
            Method::D => (false, false, true),
            Method::Best | Method::Bcd => (false, false, false),
        };
        Self { links, split, rank }
    }
}

/// The links of an iterate: who has what, and with which power.
struct Iterate {
    main: LinkPlan,
    federated: LinkPlan,
    download: Option<LinkPlan>,
}

/// The paper's algorithm, or its baseline `method` with `seed`.
pub(super) fn alternate(links: &Links<'_>, method: Method, seed: u64) -> Result<Solved, Error> {
    let problem = links.problem;
    let clients = problem.clients();
    let random = Random::of(method);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let fits = |split: usize, rank: usize| (0..clients).all(|client| problem.fits(client, split, rank));
    let (splits, ranks) = (problem.splits.len(), problem.ranks.len());
    let possible: Vec<(usize, usize)> = (0..splits)
        .flat_map(|split| (0..ranks).map(move |rank| (split, rank)))
        .filter(|&(split, rank)| fits(split, rank))
        .collect();
    let &middle = possible.get(possible.len() / 2).ok_or(Error::NothingFits)?;
    let (mut split, mut rank) = middle;
    if random.split || random.rank {
        let &(random_split, random_rank) = &possible[rng.random_range(0..possible.len())];
        if random.split {
            split = random_split;
        }
        if random.rank {
            rank = random_rank;
        }
        if !fits(split, rank) {
            (split, rank) = (random_split, random_rank);
        }
    }
    let chance = random.links.then(|| random_links(problem, &mut rng));
    let mut best: Option<Solved> = None;
    for _ in 0..MAX_ITERATIONS {
        let choice = Choice::uniform(split, rank, clients);
        let iterate = match &chance {
            Some(powers) => powers.at(problem, &choice)?,
            None => descend_links(links, &choice)?,
        };
        let total = |split: usize, rank: usize| total_s(problem, &iterate, split, rank);
        let argmin = |candidates: Vec<(usize, usize)>| {
            candidates
                .into_iter()
                .filter(|&(split, rank)| fits(split, rank))
                .min_by(|a, b| total(a.0, a.1).total_cmp(&total(b.0, b.1)))
        };
        let before = (split, rank);
        if !random.split
            && let Some(found) = argmin((0..splits).map(|split| (split, rank)).collect())
        {
            (split, rank) = found;
        }
        if !random.rank
            && let Some(found) = argmin((0..ranks).map(|rank| (split, rank)).collect())
        {
            (split, rank) = found;
        }
        let solved = finish(problem, iterate, Choice::uniform(split, rank, clients));
        let falls = best
            .as_ref()
            .is_none_or(|best| solved.total_s < best.total_s * (1.0 - 1e-9));
        if falls {
            best = Some(solved);
        }
        if !falls || (split, rank) == before {
            break;
        }
    }
    best.ok_or(Error::NothingFits)
}

fn descend_links(links: &Links<'_>, choice: &Choice) -> Result<Iterate, Error> {
    let problem = links.problem;
    let Choice { split_index, rank } = choice;
    let link = |name: LinkName, ladders: &Ladders<'_>, demand: &Demand| {
        let owner = greedy(ladders, demand);
        control(ladders.channel(), demand, &owner, problem.energy_weight_s_per_j)
            .ok_or(Error::Unreachable { link: name })
    };
    Ok(Iterate {
        main: link(LinkName::Main, &links.main, &problem.main_demand(split_index, *rank))?,
        federated: link(
            LinkName::Federated,
            &links.federated,
            &problem.federated_demand(split_index, *rank),
        )?,
        download: match &links.download {
            Some(download) => Some(link(
                LinkName::Download,
                download,
                &problem.download_demand(split_index, *rank),
            )?),
            None => None,
        },
    })
}

/// Owners and powers drawn once.
struct Chance {
    main: LinkPlan,
    federated: LinkPlan,
    download: Option<LinkPlan>,
}

impl Chance {
    fn at(&self, problem: &Problem, choice: &Choice) -> Result<Iterate, Error> {
        let Choice { split_index, rank } = choice;
        let timed = |name: LinkName, channel: &Channel, plan: &LinkPlan, demand: &Demand| {
            let plan = timed(channel, plan, demand);
            match plan.phase_s.is_finite() {
                true => Ok(plan),
                false => Err(Error::Unreachable { link: name }),
            }
        };
        Ok(Iterate {
            main: timed(
                LinkName::Main,
                &problem.main,
                &self.main,
                &problem.main_demand(split_index, *rank),
            )?,
            federated: timed(
                LinkName::Federated,
                &problem.federated,
                &self.federated,
                &problem.federated_demand(split_index, *rank),
            )?,
            download: match (&problem.download, &self.download) {
                (Some(channel), Some(plan)) => Some(timed(
                    LinkName::Download,
                    channel,
                    plan,
                    &problem.download_demand(split_index, *rank),
                )?),
                _ => None,
            },
        })
    }
}

fn random_links(problem: &Problem, rng: &mut impl Rng) -> Chance {
    Chance {
        main: random_link(&problem.main, rng),
        federated: random_link(&problem.federated, rng),
        download: problem.download.as_ref().map(|channel| random_link(channel, rng)),
    }
}

/// Every client gets one subchannel and the rest go anywhere; it sends with a random part of its cap, the same on each, less
/// where all together exceed the link's total.
fn random_link(channel: &Channel, rng: &mut impl Rng) -> LinkPlan {
    let (clients, subchannels) = (channel.clients(), channel.subchannels);
    let mut owner: Vec<usize> = (0..subchannels)
        .map(|position| match position < clients {
            true => position,
            false => rng.random_range(0..clients),
        })
        .collect();
    for last in (1..subchannels).rev() {
        owner.swap(last, rng.random_range(0..=last));
    }
    let mut counts = vec![0_usize; clients];
    owner.iter().for_each(|&client| counts[client] += 1);
    let mut sums: Vec<f64> = channel
        .power_max_w
        .iter()
        .map(|power| rng.random_range(0.05..=1.0) * power.min(channel.power_total_w))
        .collect();
    let total: f64 = sums.iter().sum();
    if total > channel.power_total_w {
        sums.iter_mut()
            .for_each(|power| *power *= channel.power_total_w / total);
    }
    LinkPlan {
        power_w: owner
            .iter()
            .map(|&client| sums[client] / counts[client] as f64)
            .collect(),
        owner,
        phase_s: 0.0,
        energy_j: 0.0,
    }
}

/// The plan with the time and energy it takes under `demand`.
fn timed(channel: &Channel, plan: &LinkPlan, demand: &Demand) -> LinkPlan {
    let (mut phase_s, mut energy_j) = (0.0_f64, 0.0);
    for client in 0..channel.clients() {
        let bits = demand.payload_bits[client];
        let sending_s = match bits > 0.0 {
            true => bits / channel.rate_bits_per_s(client, &plan.owner, &plan.power_w),
            false => 0.0,
        };
        let power: f64 = (plan.owner.iter().zip(&plan.power_w))
            .filter(|&(&owner, _)| owner == client)
            .map(|(_, power)| power)
            .sum();
        phase_s = phase_s.max(demand.wait_s[client] + sending_s);
        energy_j += power * sending_s;
    }
    LinkPlan {
        phase_s,
        energy_j,
        ..plan.clone()
    }
}

/// The total at another cut and rank, at the same owners and powers.
fn total_s(problem: &Problem, iterate: &Iterate, split: usize, rank: usize) -> f64 {
    finish(
        problem,
        iterate.again(),
        Choice::uniform(split, rank, problem.clients()),
    )
    .total_s
}

impl Iterate {
    fn again(&self) -> Self {
        Self {
            main: self.main.clone(),
            federated: self.federated.clone(),
            download: self.download.clone(),
        }
    }
}

/// The links of an iterate under the demand of `choice`, and what that comes to.
fn finish(problem: &Problem, iterate: Iterate, choice: Choice) -> Solved {
    let Choice { split_index, rank } = &choice;
    let main = timed(&problem.main, &iterate.main, &problem.main_demand(split_index, *rank));
    let federated = timed(
        &problem.federated,
        &iterate.federated,
        &problem.federated_demand(split_index, *rank),
    );
    let download = match (&problem.download, &iterate.download) {
        (Some(channel), Some(plan)) => Some(timed(channel, plan, &problem.download_demand(split_index, *rank))),
        _ => None,
    };
    let weight = problem.energy_weight_s_per_j;
    let last = match &download {
        Some(download) => download.cost_s(weight),
        None => problem.backward_s(split_index, *rank),
    };
    Solved {
        total_s: problem.total_s(
            split_index,
            *rank,
            (main.cost_s(weight), federated.cost_s(weight), last),
        ),
        lower_s: 0.0,
        main,
        main_prices: None,
        federated,
        download,
        choice,
    }
}
