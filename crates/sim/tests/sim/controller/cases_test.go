// What the Horizontal Pod Autoscaler's own code answers to random questions: makes cases.tsv, which autoscale.rs reads.
//
// It is run inside the sources of Kubernetes, of which Debian 12 has 1.20.2 as a source package (`apt-get source kubernetes`
// and golang-go). Copy this file to pkg/controller/podautoscaler there, and then:
//
//	SERVELAB_CASES=/tmp/cases.tsv go test ./pkg/controller/podautoscaler -run TestServelabCases
//
// Later versions changed two things, and no case has them: how the edge of the tolerance is compared, and what pods without
// a value count for when the others are exactly at the target.
package podautoscaler

import (
	"fmt"
	"math"
	"math/rand"
	"os"
	"strings"
	"testing"
	"time"

	autoscaling "k8s.io/api/autoscaling/v2beta2"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	metricsclient "k8s.io/kubernetes/pkg/controller/podautoscaler/metrics"
)

const casesOfEachKind = 120

// A cluster of pods with what is measured of them, as KEDA, prometheus-adapter and metrics-server would say it.
type cluster struct {
	pods     []*v1.Pod
	of       metricsclient.PodMetricsInfo
	external int64
}

func (c *cluster) copied() metricsclient.PodMetricsInfo {
	copied := metricsclient.PodMetricsInfo{}
	for name, metric := range c.of {
		copied[name] = metric
	}
	return copied
}

func (c *cluster) GetResourceMetric(v1.ResourceName, string, labels.Selector, string) (metricsclient.PodMetricsInfo, time.Time, error) {
	return c.copied(), time.Now(), nil
}

func (c *cluster) GetRawMetric(string, string, labels.Selector, labels.Selector) (metricsclient.PodMetricsInfo, time.Time, error) {
	return c.copied(), time.Now(), nil
}

func (c *cluster) GetObjectMetric(string, string, *autoscaling.CrossVersionObjectReference, labels.Selector) (int64, time.Time, error) {
	return 0, time.Time{}, fmt.Errorf("none")
}

func (c *cluster) GetExternalMetric(string, string, labels.Selector) ([]int64, time.Time, error) {
	return []int64{c.external}, time.Now(), nil
}

func (c *cluster) calculator() *ReplicaCalculator {
	indexer := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	for _, pod := range c.pods {
		if err := indexer.Add(pod); err != nil {
			panic(err)
		}
	}
	return NewReplicaCalculator(c, corelisters.NewPodLister(indexer), 0.1, 5*time.Minute, 30*time.Second)
}

// An hour old, with one container that asks for one core.
func (c *cluster) add(phase v1.PodPhase, ready bool) *v1.Pod {
	start, status := metav1.NewTime(time.Now().Add(-time.Hour)), v1.ConditionFalse
	if ready {
		status = v1.ConditionTrue
	}
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "lab", Name: fmt.Sprintf("pod-%d", len(c.pods))},
		Spec: v1.PodSpec{Containers: []v1.Container{{Resources: v1.ResourceRequirements{
			Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse("1")}}}}},
		Status: v1.PodStatus{Phase: phase, StartTime: &start, Conditions: []v1.PodCondition{
			{Type: v1.PodReady, Status: status, LastTransitionTime: start}}},
	}
	c.pods = append(c.pods, pod)
	return pod
}

func (c *cluster) measure(pod *v1.Pod, milli int64) {
	c.of[pod.Name] = metricsclient.PodMetric{Timestamp: time.Now(), Window: time.Minute, Value: milli}
}

func newCluster() *cluster { return &cluster{of: metricsclient.PodMetricsInfo{}} }

// As KEDA hands it over (`GenerateMetricInMili`, `GetMetricTargetMili`).
func milli(value float64) int64 { return int64(value * 1000) }

// With up to four places, as a rate has them, or round, as a queue is; or a multiple of the target, or less than a
// thousandth more, which is the same where values are thousandths.
func someUsage(random *rand.Rand, target, most float64) float64 {
	value := most * target * random.Float64() * random.Float64()
	switch random.Intn(6) {
	case 0:
		return math.Round(value/target) * target
	case 1:
		return math.Round(value/target)*target + 0.0004
	}
	places := []float64{1, 10, 10, 1000, 10000}[random.Intn(5)]
	return math.Round(value*places) / places
}

func someTarget(random *rand.Rand) float64 {
	return []float64{0.1, 0.3, 0.7, 0.85, 1, 1.1, 2.5, 4, 5, 10, 64}[random.Intn(11)]
}

func onTheEdge(ratio float64) bool {
	return math.Abs(math.Abs(1-ratio)-0.1) < 1e-9
}

func list(values []float64) string {
	texts := make([]string, len(values))
	for i, value := range values {
		texts[i] = fmt.Sprint(value)
	}
	return strings.Join(texts, ",")
}

// ratio: current, ready, usage, target, replicas
func ratioCase(random *rand.Rand) string {
	c, current := newCluster(), 1+random.Intn(20)
	ready := current
	if random.Intn(2) == 0 {
		ready = random.Intn(current + 1)
	}
	for i := 0; i < current; i++ {
		c.add(v1.PodRunning, i < ready)
	}
	target := someTarget(random)
	usage := someUsage(random, target, 4)
	c.external = milli(usage)
	if onTheEdge(float64(c.external) / float64(milli(target))) {
		return ""
	}
	if random.Intn(10) == 0 {
		current, ready = 0, 0
	}
	replicas, _, _, err := c.calculator().GetExternalMetricReplicas(
		int32(current), milli(target), "m", "lab", &metav1.LabelSelector{}, labels.Everything())
	return line(err, "ratio", current, ready, usage, target, replicas)
}

// per_pod: existing, usage, target, replicas
func perPodCase(random *rand.Rand) string {
	c, existing := newCluster(), random.Intn(20)
	target := someTarget(random)
	usage := someUsage(random, target, 40)
	c.external = milli(usage)
	if onTheEdge(float64(c.external) / (float64(milli(target)) * float64(existing))) {
		return ""
	}
	replicas, _, _, err := c.calculator().GetExternalPerPodMetricReplicas(
		int32(existing), milli(target), "m", "lab", &metav1.LabelSelector{})
	return line(err, "per_pod", existing, usage, target, replicas)
}

// pods: current, unready, missing, values, target, replicas
func podsCase(random *rand.Rand) string {
	c, known := newCluster(), 1+random.Intn(8)
	unready, missing := random.Intn(3)*random.Intn(2), random.Intn(3)*random.Intn(2)
	target := someTarget(random)
	most := []float64{1, 2, 6}[random.Intn(3)]
	values, total := []float64{}, int64(0)
	for i := 0; i < known; i++ {
		values = append(values, someUsage(random, target, most))
		c.measure(c.add(v1.PodRunning, true), milli(values[i]))
		total += milli(values[i])
	}
	for i := 0; i < unready; i++ {
		c.add(v1.PodPending, false)
	}
	for i := 0; i < missing; i++ {
		c.add(v1.PodRunning, true)
	}
	current := known + unready + missing
	if missing > 0 && total/int64(known) == milli(target) {
		return ""
	}
	for pods := known; pods <= current; pods++ {
		for _, assumed := range []int64{0, int64(missing) * milli(target)} {
			if onTheEdge(float64((total+assumed)/int64(pods)) / float64(milli(target))) {
				return ""
			}
		}
	}
	replicas, _, _, err := c.calculator().GetMetricReplicas(
		int32(current), milli(target), "m", "lab", labels.Everything(), labels.Everything())
	return line(err, "pods", current, unready, missing, list(values), target, replicas)
}

// resource: current, unready, missing, percents of the others, target, replicas
func resourceCase(random *rand.Rand) string {
	c, known := newCluster(), 1+random.Intn(8)
	unready, missing := random.Intn(3)*random.Intn(2), random.Intn(3)*random.Intn(2)
	target := 10 * (1 + random.Intn(9))
	values, total := []float64{}, int64(0)
	for i := 0; i < known; i++ {
		tenths := int64(random.Intn(1000))
		values = append(values, float64(tenths)/10)
		c.measure(c.add(v1.PodRunning, true), tenths)
		total += tenths
	}
	for i := 0; i < unready; i++ {
		c.add(v1.PodPending, false)
	}
	for i := 0; i < missing; i++ {
		c.add(v1.PodRunning, true)
	}
	current := known + unready + missing
	if missing > 0 && total*100/int64(known*1000) == int64(target) {
		return ""
	}
	for pods := known; pods <= current; pods++ {
		for _, assumed := range []int64{0, int64(missing) * 1000} {
			if onTheEdge(float64((total+assumed)*100/int64(pods*1000)) / float64(target)) {
				return ""
			}
		}
	}
	replicas, _, _, _, err := c.calculator().GetResourceReplicas(
		int32(current), int32(target), v1.ResourceCPU, "lab", labels.Everything(), "")
	return line(err, "resource", current, unready, missing, list(values), target, replicas)
}

func line(err error, fields ...interface{}) string {
	if err != nil {
		panic(err)
	}
	texts := make([]string, len(fields))
	for i, field := range fields {
		texts[i] = fmt.Sprint(field)
	}
	return strings.Join(texts, "\t")
}

func TestServelabCases(t *testing.T) {
	random, lines := rand.New(rand.NewSource(7)), []string{}
	for _, kind := range []func(*rand.Rand) string{ratioCase, perPodCase, podsCase, resourceCase} {
		for made := 0; made < casesOfEachKind; {
			if text := kind(random); text != "" {
				lines = append(lines, text)
				made++
			}
		}
	}
	if err := os.WriteFile(os.Getenv("SERVELAB_CASES"), []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}
